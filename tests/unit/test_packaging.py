"""pyproject.toml, constraints.txt and environment.yml agree with each other and with what the code imports."""

import ast
import re
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OURS = {"course_utils", "solutions", "tests"}
OURS |= {
    n
    for top in ("tests", "benchmarks", "docs/site")
    for p in (ROOT / top).rglob("*.py")
    for n in (p.stem, p.parent.name)
}


def requirements(lines: list[str]) -> dict[str, SpecifierSet]:
    """Canonical names and the versions that they allow."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one.specifier for one in parsed}


CORE = requirements(PYPROJECT["project"]["dependencies"])
TEST = requirements(PYPROJECT["project"]["optional-dependencies"]["test"])
BROWSER = requirements(PYPROJECT["project"]["optional-dependencies"]["browser"])
SITE = requirements(PYPROJECT["project"]["optional-dependencies"]["site"])
PEERS = requirements(PYPROJECT["project"]["optional-dependencies"]["peers"])
ASIDE = {"dictionary-learning": SpecifierSet()}  # its pins fit no extra: benchmarks/bench_dictionaries.py
REAL = requirements(PYPROJECT["project"]["optional-dependencies"]["real"])
CLUSTER = requirements(PYPROJECT["project"]["optional-dependencies"]["cluster"])


def constraints() -> dict[str, SpecifierSet]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return requirements([line for line in lines if line and not line.startswith("#")])


def conda() -> dict[str, SpecifierSet]:
    """The packages of environment.yml, those under `pip:` included, under their names on PyPI."""
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    found = re.findall(r"^ +- ([A-Za-z][\w-]*[<>=][^\s#]+)", text, re.MULTILINE)
    return requirements([re.sub("^pytorch", "torch", line) for line in found])


def imported(folder: str) -> set[str]:
    """The top-level names of other people's modules that the files in a folder import."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - OURS


def test_constraints_pin_every_requirement_exactly_and_within_its_range() -> None:
    pins = constraints()
    assert {str(pin)[:2] for pin in pins.values()} == {"=="}
    for name, allowed in (CORE | TEST | CLUSTER | BROWSER | SITE | REAL).items():
        version = str(pins[name]).removeprefix("==")
        assert version in allowed, f"{name}: constraints.txt has {version}, pyproject.toml asks for {allowed}"


def test_torch_is_pinned_without_a_platform() -> None:
    assert "+" not in str(constraints()["torch"]), "a local version such as +cpu exists on one platform only"


def test_environment_names_the_same_packages_and_ranges() -> None:
    environment = conda()
    assert environment.pop("python") == SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert environment == CORE | TEST


@pytest.mark.parametrize("name", sorted(CORE | TEST | CLUSTER | BROWSER | SITE | REAL))
def test_every_requirement_says_why(name: str) -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if re.match(rf'\s+"{name}[<>=]', line)]
    assert re.search(r'",\s+# .{10,}', line), f"pyproject.toml: say in a comment who needs {name} and why"


@pytest.mark.parametrize(
    ("folder", "declared"),
    [
        ("course_utils", CORE | CLUSTER),
        ("solutions", CORE),
        ("tests", CORE | TEST | CLUSTER | BROWSER),
        ("benchmarks", CORE | TEST | PEERS | ASIDE),
        ("docs/site", CORE | SITE),
    ],
)
def test_every_import_is_declared(folder: str, declared: dict[str, SpecifierSet]) -> None:
    distributions = packages_distributions()
    missing = {
        module
        for module in imported(folder)
        # an extra that is not installed goes by the name of its module
        if not {canonicalize_name(name) for name in distributions.get(module, [module])} & set(declared)
    }
    assert not missing, f"{folder} imports {sorted(missing)}: declare them in pyproject.toml"


def test_every_package_folder_is_built() -> None:
    folders = {
        init.parent.relative_to(ROOT)
        for top in ("course_utils", "solutions")
        for init in (ROOT / top).rglob("__init__.py")
    }
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"]) - {"course_utils.chapters"}
    assert listed == {".".join(folder.parts) for folder in folders}


def test_every_folder_with_code_is_a_package() -> None:
    for top in ("course_utils", "solutions"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.relative_to(ROOT)} would be missing from the wheel"


def test_the_changelog_speaks_of_this_version() -> None:
    headings = re.findall(r"^## .*", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert PYPROJECT["project"]["version"] in headings[0]


def test_each_pin_can_be_installed_from_the_first_release_of_each_python_on() -> None:
    """Debian 12 has Python 3.11.2: where a pin asked for 3.11.5, `make lab` tried all versions, and failed."""
    pins = constraints()
    for one in distributions():
        pin, wanted = pins.get(canonicalize_name(one.metadata["Name"])), one.metadata.get("Requires-Python")
        if pin is not None and wanted and pin.contains(one.version):
            refused = [v for v in ("3.11.0", "3.12.0", "3.13.0") if not SpecifierSet(wanted).contains(v)]
            assert not refused, f"{one.metadata['Name']} {one.version} cannot be installed on Python {refused}"


def test_no_weights_are_left_behind_in_the_root() -> None:
    """What ships lies in `course_utils`; anything here was written by a test, or by an answer that lost its folder."""
    left = [path.name for path in ROOT.iterdir() if path.suffix in {".safetensors", ".pt", ".npz", ".npy"}]
    assert not left
