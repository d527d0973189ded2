"""`course doctor`: every fault, simulated, is found and comes with the command that helps; a sound machine is sound."""

import collections
import hashlib
import shutil
import sys
import types
import webbrowser
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from course_utils import doctor, fetching, places
from course_utils.cli import main
from course_utils.doctor import LOOKS, Finding

Version = collections.namedtuple("Version", "major minor micro")
Usage = collections.namedtuple("Usage", "total used free")
Memory = collections.namedtuple("Memory", "total available")
Spec = collections.namedtuple("Spec", "argv resource_dir")


@pytest.fixture(autouse=True)
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which nothing is wrong, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "metadata", types.SimpleNamespace(PackageNotFoundError=metadata.PackageNotFoundError))
    asked = ["torch>=2.4", "jupyterlab>=4; extra == 'lab'", "x; extra == 'y'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: asked, raising=False)
    installed(monkeypatch, torch="2.13.0+cpu", jupyterlab="4.6.6")
    monkeypatch.setattr(doctor, "constraints", lambda: {"torch": "2.13.0", "jupyterlab": "4.6.6"})
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(8e9, 4e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(9e9, 1e9, 8e9))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"/cache/{file}")
    monkeypatch.setattr(doctor, "fetched", lambda name: tmp_path / name)
    monkeypatch.setattr(webbrowser, "get", lambda: object())
    kernel(monkeypatch, Spec(["python"], "/share/python3"))


def kernel(monkeypatch: pytest.MonkeyPatch, spec: Spec) -> None:
    monkeypatch.setattr("jupyter_client.kernelspec.KernelSpecManager.get_kernel_spec", lambda self, name: spec)


def looked(subject: str, state: str) -> Finding:
    """The one finding of that state when this is looked at."""
    (finding,) = [finding for finding in LOOKS[subject]() if finding.state == state]
    return finding


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Only these are installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version, raising=False)


def test_a_sound_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "No problems found."
    assert [line.split()[0] for line in lines if " problem " in line or " note " in line] == []
    for subject in LOOKS:
        assert any(line.startswith(f"{subject} ") for line in lines), subject


def test_a_problem_is_printed_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", Version(3, 10, 4))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(9e9, 8.9e9, 1e8))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Python      problem  3.10.4; the course needs 3.11 to 3.13"
    assert lines[1] == "                     try: python3.13 -m venv --clear .venv"
    assert lines[-1] == "Problems: 2."


@pytest.mark.parametrize("version", [Version(3, 10, 9), Version(3, 14, 0)])
def test_python_too_old_or_too_new(monkeypatch: pytest.MonkeyPatch, version: Version) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert looked("Python", "problem").command == "python3.13 -m venv --clear .venv"


def test_packages_missing_too_old_or_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "all 2 are installed" in looked("packages", "fine").words
    installed(monkeypatch, torch="2.3.1", jupyterlab="4.6.6")
    found = looked("packages", "problem")
    assert found.words == "torch 2.3.1 does not satisfy >=2.4" and found.command.endswith("'")
    installed(monkeypatch, torch="2.13.0")
    assert looked("packages", "problem").words == "jupyterlab is missing"
    installed(monkeypatch, torch="2.14.0", jupyterlab="4.6.6")
    assert looked("packages", "note").words == "not the version that was tested: torch 2.14.0"


def test_course_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    found = looked("packages", "problem")
    assert "not installed" in found.words and "pip install -c" in found.command


def test_constraints_are_those_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pins = doctor.constraints()
    assert pins["torch"] == "2.13.0" and pins["pywinpty"] and "jupyter-server" in pins
    monkeypatch.setattr(doctor, "__file__", "/somewhere/site-packages/course_utils/doctor.py")
    assert doctor.constraints() == {} and doctor.install().endswith("--upgrade 'circuits-from-scratch'")


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = looked("torch", "problem")
    assert "cannot be imported" in found.words and found.command.endswith("--force-reinstall torch")


def test_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("torch.version.cuda", None)
    assert "without CUDA" in looked("torch", "note").words and "whl/cu" in looked("torch", "note").command
    monkeypatch.setattr("torch.version.cuda", "12.6")
    assert looked("torch", "problem").command == "nvidia-smi"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    card = types.SimpleNamespace(name="Card 1", total_memory=24e9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: card)
    assert [finding.words for finding in LOOKS["torch"]()][1:] == ["GPU: Card 1, 24 GB"]


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(8e9, 1.2e9))
    found = looked("memory", "problem")
    assert found.words.startswith("1.2 of 8.0 GB are free, 2 are needed") and found.command.endswith("server list")


def test_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(9e9, 8.7e9, 3e8))
    found = looked("disk", "problem")
    assert found.words.startswith("0.3 GB are free in ") and found.command.endswith("pip cache purge")


def test_work_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "work").mkdir()
    (tmp_path / "work/00_tensors.ipynb").write_text("{}")
    assert "work can be written; 1 chapters are there" in looked("work", "fine").words
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = looked("work", "problem")
    assert found.words == f"nothing can be written into {tmp_path / 'work'} (Permission denied)"
    assert found.command.startswith("sudo chown -R ")


@pytest.mark.parametrize("name", ["random.py", "torch.py"])
def test_a_file_that_is_called_like_a_module(tmp_path: Path, name: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / name).write_text("x = 1")
    found = looked("work", "problem")
    assert found.words.startswith(f"{tmp_path / 'work' / name} has the name of a module")
    assert found.command == f"mv '{tmp_path / 'work' / name}' '{tmp_path / 'work' / f'my_{name}'}'"


def test_course_without_chapters_or_beside_foreign_solutions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "chapters_folder", lambda: tmp_path)
    assert "there are no chapters" in looked("course", "problem").words

    def foreign() -> None:
        raise places.CourseError("`import solutions` finds another one")

    monkeypatch.undo()
    monkeypatch.setattr(doctor, "verify_solutions", foreign)
    assert looked("course", "problem").words == "`import solutions` finds another one"


def test_hub_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: (name == "gpt2" and file) or None)
    found = looked("hub models", "note")
    assert found.words.startswith("EleutherAI/pythia-70m is not in ")
    assert found.command == "hf download EleutherAI/pythia-70m"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert looked("hub models", "problem").command.startswith("export HF_HUB_CACHE=")


def test_what_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    small = replace(fetching.PACKAGES["gpt2-vocabulary"], files={"a": ("b", hashlib.sha256(b"").hexdigest())})
    monkeypatch.setattr(doctor, "PACKAGES", {"gpt2-vocabulary": small})
    monkeypatch.setattr(doctor, "fetched", fetching.fetched)
    monkeypatch.setitem(fetching.PACKAGES, "gpt2-vocabulary", small)
    found = looked("fetched", "note")
    assert found.words == "gpt2-vocabulary is not on this machine (0.6 MB); cells that need it are skipped"
    assert found.command == "course models fetch gpt2-vocabulary"
    (tmp_path / "gpt2-vocabulary").mkdir()
    (tmp_path / "gpt2-vocabulary" / "a").write_text("")
    assert looked("fetched", "fine").words == f"gpt2-vocabulary is in {tmp_path / 'gpt2-vocabulary'}"
    (tmp_path / "gpt2-vocabulary" / "a").write_text("x")
    found = looked("fetched", "problem")
    assert found.words.endswith("a is damaged or was changed, its SHA-256 is not the published one")
    assert found.command == "course models fetch gpt2-vocabulary"


def test_kernel_of_another_environment_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, Spec(["/usr/bin/python3", "-m", "ipykernel_launcher"], "/root/.local/share/python3"))
    found = looked("kernel", "problem")
    assert "starts /usr/bin/python3, not this Python" in found.words
    assert found.command.endswith("-m ipykernel install --sys-prefix --name python3")
    kernel(monkeypatch, Spec([sys.executable], "/share/python3"))
    assert looked("kernel", "fine")

    def none(self: object, name: str) -> None:
        from jupyter_client.kernelspec import NoSuchKernel

        raise NoSuchKernel(name)

    monkeypatch.setattr("jupyter_client.kernelspec.KernelSpecManager.get_kernel_spec", none)
    assert looked("kernel", "problem").words == "there is no kernel `python3`"
    monkeypatch.setitem(sys.modules, "jupyter_client.kernelspec", None)
    assert "no Jupyter" in looked("kernel", "problem").words


def test_kernel_without_ipykernel(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = types.SimpleNamespace(returncode=1)
    monkeypatch.setattr("subprocess.run", lambda *command, **options: failed)
    assert "ipykernel cannot be imported" in looked("kernel", "problem").words


def test_no_jupyterlab_or_no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "get", none)
    assert looked("JupyterLab", "note").command == "course lab --no-browser"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert looked("JupyterLab", "problem").command.startswith("export JUPYTER_RUNTIME_DIR=")
    installed(monkeypatch, torch="2.13.0")
    assert "JupyterLab is missing" in looked("JupyterLab", "problem").words
