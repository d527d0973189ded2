"""Helpers of the course Circuits from Scratch; each module is imported by name, so this package alone is cheap."""

from typing import Any


def load_ipython_extension(shell: Any) -> None:
    """Run by `%load_ext course_utils`, the first cell of every chapter."""
    from course_utils.unwritten import show_unwritten_kindly

    show_unwritten_kindly(shell)
