"""Slow tests run only where something that they depend on has changed since they passed: a plugin of pytest.

    @pytest.mark.unless_unchanged("mutants", lambda exercise: fingerprint(...))
    @pytest.mark.parametrize("exercise", ...)
    def test_small_changes_of_the_reference_are_refused(exercise): ...

The function is handed the test's parameters. `--record` writes the fingerprints of what has passed to
`tests/passed.json`, which is committed; `--all-mutants` and `--all-chapters` run everything (GitHub: every night).
With several processes (pytest-xdist) each finds out for itself what to leave out, and the first collects what passed.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.depends import ROOT

PASSED = ROOT / "tests" / "passed.json"
KINDS = {
    "mutants": "small changes of the reference solutions",
    "chapters": "chapters as Colab runs them, on the real model, with another Transformer, or graded in another order",
}
FINGERPRINT = pytest.StashKey[tuple[str, str]]()  # of a marked test: its key in the file, and what it depends on


def pytest_addoption(parser: pytest.Parser) -> None:
    for kind, what in KINDS.items():
        parser.addoption(f"--all-{kind}", action="store_true", help=f"run all tests of {what}, changed or not")
    parser.addoption("--record", action="store_true", help=f"note in tests/{PASSED.name} what has passed")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Passed(config, PASSED), "passed")


class Passed:
    """What passed before, what is left out therefore, and what passes now."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self.config, self.path = config, path
        self.before = read(path)
        self.collected: set[str] = set()
        self.now: dict[str, str] = {}
        self.failed: set[str] = set()
        self.left_out = dict.fromkeys(KINDS, 0)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self.collected.add(item.name)

    @pytest.hookimpl(trylast=True)  # after -k and -m: what nobody asks for need not be fingerprinted
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        keys: set[str] = set()
        unchanged = []
        for item in items:
            marker = item.get_closest_marker("unless_unchanged")
            if marker is None or not isinstance(item, pytest.Function):
                continue
            kind, depends_on = marker.args
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            key = item.name
            if key in keys:
                raise pytest.UsageError(f"two tests marked unless_unchanged are called {key}: rename one")
            keys.add(key)
            item.stash[FINGERPRINT] = key, depends_on(**parameters)
            if self.before.get(key) == item.stash[FINGERPRINT][1] and not self.config.getoption(f"--all-{kind}"):
                self.left_out[kind] += 1
                unchanged.append(item)
        if unchanged:
            self.config.hook.pytest_deselected(items=unchanged)
            items[:] = [item for item in items if item not in unchanged]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):  # type: ignore[no-untyped-def]
        report = yield
        if FINGERPRINT in item.stash:
            key, print_ = item.stash[FINGERPRINT]
            if report.when == "call" and report.passed:
                self.now[key] = print_
            elif report.failed:
                self.failed.add(key)
        return report

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Of pytest-xdist: one of its processes has ended, and what it found comes here."""
        found = getattr(node, "workeroutput", {}).get("passed")
        if found:
            self.collected.update(found["collected"])
            self.now.update(found["now"])
            self.failed.update(found["failed"])
            self.left_out = found["left_out"]  # the same in each

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workeroutput"):  # one of several processes
            found = {"collected": list(self.collected), "now": self.now, "failed": list(self.failed)}
            self.config.workeroutput["passed"] = {**found, "left_out": self.left_out}
            return
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and any(self.left_out.values()):
            session.exitstatus = pytest.ExitCode.OK
        if self.config.getoption("--record"):
            kept = {**read(self.path), **self.now}  # read again: another run may have ended meanwhile
            if self.config.args_source is pytest.Config.ArgsSource.TESTPATHS:  # the whole suite: others are gone
                kept = {key: value for key, value in kept.items() if key in self.collected}
            write(self.path, {key: value for key, value in kept.items() if key not in self.failed})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for kind, number in self.left_out.items():
            if number:
                terminalreporter.write_line(
                    f"Left out: {KINDS[kind]} ({number}), for nothing that they depend on has changed since they "
                    f"passed. To run them too: --all-{kind}"
                )
        new = sum(self.before.get(key) != value for key, value in self.now.items())
        if new and not self.config.getoption("--record"):
            terminalreporter.write_line(
                f"Passed with something new that they depend on: {new}. To leave them out from now on: --record, "
                f"and commit tests/{self.path.name}"
            )


def read(path: Path) -> dict[str, str]:
    """The fingerprints in the file; no file is an empty one."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:  # after a merge, most often
        raise pytest.UsageError(f"{path}: {error}. Take either side of a conflict, then run pytest --record.") from None


def write(path: Path, fingerprints: dict[str, str]) -> None:
    """One line an entry, in order, so that branches merge."""
    path.write_text(json.dumps(fingerprints, indent=0, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
