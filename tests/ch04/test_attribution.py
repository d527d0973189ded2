"""What the check of this section cannot know: see tests/test_checks.py."""

from typing import Any

SECRETS = ()
SURPRISES: dict[str, list[tuple[str, Any]]] = {}
ALSO_RIGHT: dict[str, list[Any]] = {}
