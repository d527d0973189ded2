"""Unpack what learners handed in, which may be hostile, damaged, or written by a system with ideas of its own."""

import contextlib
import re
import stat
import zipfile
from pathlib import Path, PurePosixPath

from course_utils.places import CourseError

NOTEBOOK = re.compile(r"\.ipynb(\.txt|\.json)?$", re.IGNORECASE)  # browsers like to add an ending
LARGEST_UNPACKED = 20 * 2**30
HARMLESS = 2**29  # a zip may hold that much, however small it is
DENSEST = 200  # times its own size; notebooks with plots reach 20
UTF_8 = 0x800  # the flag of a zip's member whose name is marked as UTF-8


def unpack(source: Path, folder: Path, shown: str = "", room: int = LARGEST_UNPACKED) -> int:
    """Unpack the notebooks and zips in a zip, and put empty files for the rest; returns the bytes that were written.

    Raises CourseError before the first where one would escape or all be too much; it calls the zip `shown`.
    """
    shown = shown or str(source)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            for member in members:
                member.filename = written_as(member)
                path = PurePosixPath(member.filename)
                link = stat.S_ISLNK(member.external_attr >> 16)
                if link or path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
                    raise CourseError(
                        f"{shown} holds {member.filename!r}, which leads out of its folder: not unpacked."
                    )
            wanted = [
                member
                for member in members
                if NOTEBOOK.search(member.filename) or member.filename.lower().endswith(".zip")
            ]
            size = sum(member.file_size for member in wanted)
            if size > max(HARMLESS, DENSEST * source.stat().st_size) or size > room:
                raise CourseError(
                    f"{shown} would unpack to {size / 2**30:.1f} GB, more than notebooks take: not unpacked."
                )
            for member in wanted:
                archive.extract(member, folder)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError) as error:
        raise CourseError(f"{shown} cannot be unpacked: {error}.") from None
    for member in members:
        place = folder / member.filename
        with contextlib.suppress(OSError, ValueError):
            (place if member.filename.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
            if not member.filename.endswith("/"):
                place.touch()
    return size


def written_as(member: zipfile.ZipInfo) -> str:
    """The path of a zip's member; Windows may write `/` as a backslash, and macOS forgets to mark names as UTF-8."""
    name = member.filename
    if not member.flag_bits & UTF_8:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")
