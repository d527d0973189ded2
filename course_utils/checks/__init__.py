"""The checks behind every exercise: `check(obj)` in the notebook, the same functions under pytest."""

from course_utils.checks.comparing import compare, unchanged
from course_utils.checks.finding import find_checks
from course_utils.checks.outcomes import CheckFailed, NotWritten
from course_utils.checks.running import check, run_check
from course_utils.checks.whose import refuse_foreign

__all__ = ["CheckFailed", "NotWritten", "check", "compare", "find_checks", "refuse_foreign", "run_check", "unchanged"]
