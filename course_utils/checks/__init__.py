"""The checks behind every exercise: `check(obj)` in the notebook, the same functions under pytest."""

from course_utils.checks.core import (
    CheckFailed,
    NotWritten,
    check,
    compare,
    find_checks,
    refuse_foreign,
    run_check,
    unchanged,
)

__all__ = ["CheckFailed", "NotWritten", "check", "compare", "find_checks", "refuse_foreign", "run_check", "unchanged"]
