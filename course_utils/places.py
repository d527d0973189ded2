"""Where things are: the chapters, the learner's copies of them, the checkout, the solutions."""

import importlib.util
from pathlib import Path

COURSE = "circuits-from-scratch"


class CourseError(Exception):
    """Something that a person can put right; the message is one sentence that says how."""

    def _render_traceback_(self) -> list[str]:  # IPython prints these lines instead of frames
        return [str(self)]


def checkout() -> Path | None:
    """The copy of the repository that the current folder is part of, if it is."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "chapters" / "src").is_dir() and (folder / "course_utils").is_dir():
            return folder
    return None


def chapters_folder() -> Path:
    """Where the learner's notebooks come from: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "chapters"
    return installed if installed.is_dir() else package.parent / "chapters"


def work_folder() -> Path:
    """Where the learner's own copies are: `work` in the checkout that the current folder is part of, else `./work`."""
    here = Path.cwd()
    root = here.parent if here.name == "work" else here
    return (checkout() or root) / "work"


def own_notebooks(chapter: str) -> list[Path]:
    """The learner's notebooks of a chapter; the first counts: it has the chapter's own name, or else is the newest."""
    names = {path.name for path in chapters_folder().glob(f"{chapter}_*.ipynb")}
    paths = work_folder().glob(f"{chapter}_*.ipynb")
    return sorted(paths, key=lambda path: (path.name not in names, -path.stat().st_mtime))


def choice(paths: list[Path]) -> str:
    """Which of several notebooks is read; nothing where there is no choice."""
    return f"{paths[0].name}, not {', '.join(path.name for path in paths[1:])}" if len(paths) > 1 else ""


def verify_solutions() -> None:
    """Raise CourseError when `import solutions` would find somebody else's package; found out without importing it."""
    spec = importlib.util.find_spec("solutions")
    if spec is None:
        raise CourseError(f"The package `solutions` is missing: install {COURSE} again.")
    if spec.origin is None or COURSE not in Path(spec.origin).read_text(encoding="utf-8", errors="replace"):
        found = Path(spec.origin).parent if spec.origin else next(iter(spec.submodule_search_locations or ["?"]))
        raise CourseError(
            f"`import solutions` finds {found}, which is not this course's: rename it, or work in another folder."
        )
