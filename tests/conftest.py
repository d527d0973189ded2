"""`pytest --notebook PATH` checks a learner's notebook with the tests that check the reference solutions."""

import os
import pkgutil
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

pytest_plugins = ["tests.support.passed"]  # what has not changed since it passed is left out

ROOT = Path(__file__).resolve().parent.parent

# Annotated shapes hold at every call. In the checks this is looked at only at night (`--jaxtyping-packages`): they call
# small helpers so often that their tests would take three times as long.
PARTS = [part.name for part in pkgutil.iter_modules([str(ROOT / "course_utils")])]
install_import_hook(["solutions", *(f"course_utils.{name}" for name in PARTS if name != "checks")], "beartype.beartype")

# A busy machine is no fault of what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# What Chromium would fetch by itself, and every way out: names resolve to nothing but this machine.
CHROMIUM = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
CHROMIUM += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"]

PROJECT = """\
[project]
name = "circuits-from-scratch"
version = "1.2.3"

[project.urls]
Repository = "https://github.com/somebody/something"
"""

SOLUTIONS = '''"""Solutions of a small chapter."""

import torch
from torch import Tensor, nn

SCALE = 2.0


def double(x: Tensor) -> Tensor:
    """Twice x."""
    # The secret is here.
    return SCALE * x


class Shift(nn.Module):
    """Adds a learned number."""

    def __init__(self) -> None:  # given
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the number, and twice that."""
        return double(x + self.by)


class Note:
    """Something to read."""

    def __init__(self, text: str) -> None:
        self.text = text
'''

LESSON = """\
---
kernelspec:
  display_name: Some kernel
  language: python
  name: some_kernel
---

# A small chapter

Prose with $x^2$.

```{code-cell} python
:tags: [setup]
import torch
from torch import Tensor, nn

from course_utils.checks import check
```

## Doubling

```{code-cell} python
:tags: [given]
from solutions.ch07_toy import SCALE
```

```{code-cell} python
:tags: [exercise]
:difficulty: 2
:minutes: 10
from solutions.ch07_toy import double
```

```{code-cell} python
check(double)
```

```{code-cell} python
x = torch.ones(3)
print(x.sum())
```

```{code-cell} python
doubled = double(x)
doubled
```

## Shifting

```{code-cell} python
:tags: [given]
from solutions.ch07_toy import Note
```

```{code-cell} python
:tags: [exercise]
:difficulty: 3
:minutes: 15
from solutions.ch07_toy import Shift
```

```{code-cell} python
check(Shift)
```

```{code-cell} python
shift = Shift()
note = Note("made")
```

```{code-cell} python
shifted = shift(x)
```

```{code-cell} python
print(shifted.shape, doubled.shape)
```

```{code-cell} python
print(Note("an end").text)
```
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--notebook", type=Path, help="check this notebook instead of the reference solutions")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests in a browser (they need chromium), the rehearsal (it takes minutes) and those of a real language model (it
    is fetched) run only where `-m` names them.
    """
    for marker in ("browser", "rehearsal", "real"):
        if marker not in config.getoption("markexpr"):
            left_out = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, which reaches this machine and no other."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "there is no chromium: apt-get install chromium"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    from tests.support.environments import build_wheel

    return build_wheel(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist"))


@pytest.fixture
def small_course(tmp_path: Path) -> Path:
    """The root of a course with one chapter of two exercises, not built yet."""
    for folder in ("chapters/src", "solutions", "course_utils"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "solutions/ch07_toy.py").write_text(SOLUTIONS)
    (tmp_path / "chapters/src/07_toy.md").write_text(LESSON)
    return tmp_path


@pytest.fixture(scope="session")
def box() -> str:
    """The name of the sandbox; without one, tests of it are skipped here, and fail where `.ci/run` asks for one."""
    from course_utils.grading import sandbox

    name, why = sandbox.choose()
    if name == "none":
        if os.environ.get("NEEDS_SANDBOX"):
            pytest.fail(f"no sandbox: {why}")
        pytest.skip(f"no sandbox: {why}")
    return name


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no notebook may see, with a file in it."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text("nobody's business")
    return folder


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    """Where somebody listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
