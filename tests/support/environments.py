"""New Python environments with the wheel of this course, such as a stranger's, without network.

The wheel is built without build isolation (setuptools comes with the extra `test`). torch and everything else that the
course needs are lent by the environment of this test run, which saves minutes and gigabytes.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.conftest import ROOT

BIN = "Scripts" if os.name == "nt" else "bin"
# Every way out leads nowhere, but for this machine itself.
NO_NETWORK = {
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
}


def clean_environment(**variables: str) -> dict[str, str]:
    """The variables of a stranger's shell: none of this test run may help."""
    ours = ("PYTHON", "JUPYTER", "VIRTUAL", "PIP_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return clean | {"PYTHONUTF8": "1", "PIP_CONFIG_FILE": os.devnull} | variables


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a stranger would."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(**({"OMP_NUM_THREADS": "1"} | variables)),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=1800,  # it only ends what hangs
    )


def build_wheel(source: Path, target: Path) -> Path:
    """The wheel, built from a copy in `source`: setuptools leaves a build folder beside its sources."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("course_utils", "solutions", "chapters"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", target, source]
    built = run(sys.executable, "-m", "pip", "wheel", *options, cwd=target)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = target.glob("*.whl")
    return path


def new_environment(home: Path) -> Path:
    """A new environment that has every package of this one but the course itself; the folder of its `python`.

    The packages are links in a folder which a .pth file names. The editable install of this checkout is left out, its
    metadata too, so that pip does not find the course there either.
    """
    venv.create(home, with_pip=False)
    lent = home / "lent"
    lent.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if "circuits_from_scratch" not in entry.name and entry.suffix != ".pth":
                (lent / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    (site_packages(home) / "lent.pth").write_text(f"{lent}\n", encoding="utf-8")
    return home / BIN


def site_packages(home: Path) -> Path:
    """Where a new environment keeps what is installed in it."""
    # asked of it, not of sysconfig here: this interpreter may be a link, or its layout a distribution's own
    answer = run(home / BIN / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home)
    return Path(answer.stdout.strip())


def lab_address(lab: subprocess.Popen[str], lines: list[str] | None = None) -> str:
    """The address that a `course lab` which has just been started prints; `lines` takes all that it says till then."""
    lines = [] if lines is None else lines
    for line in lab.stdout or ():
        lines.append(line)
        if "JupyterLab: " in line:
            break
    address = re.search(r"http://\S+", lines[-1])
    assert address, "".join(lines)
    return address[0]
