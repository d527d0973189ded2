"""A sandbox for the tests of grading, which must be there in CI."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_utils.grading import sandbox


@pytest.fixture(scope="session")
def box() -> str:
    """The name of the sandbox; without one, tests of it are skipped here, and fail where `.ci/run` asks for one."""
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
