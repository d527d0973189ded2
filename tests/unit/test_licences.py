"""docs/licences.md names all that ships, is fetched or is installed, with the licence that it has."""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata

import pytest

from course_utils.fetching import PACKAGES
from course_utils.pretrained import HUB, shipped_models
from tests.conftest import ROOT

TEXT = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", TEXT, re.MULTILINE)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# By what packages say in words, which name no SPDX identifier.
SPOKEN = {"Apache-2.0": r"Apache( Software License|-2| 2)", "MIT": "MIT", "BSD": "BSD", "MPL-2.0": "MPL-2|Mozilla"}


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def requirements(group: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in group}  # type: ignore[index]


def licence_of(package: str) -> str:
    """What the page says."""
    [cell] = [row[-1] for row in ROWS if package in names(row[-2])]
    return cell


def test_every_model_that_ships_has_the_licence_of_its_card() -> None:
    said = {name: row[1] for row in ROWS if len(row) == 2 for name in names(row[0])}
    for card in shipped_models():
        assert said.get(card["name"]) == card["licence"] == "MIT", card["name"]


def test_everything_that_is_fetched_is_named() -> None:
    for name, package in PACKAGES.items():
        [row] = [row for row in ROWS if row[0] == f"`course models fetch {name}`"]
        assert package.archive in row[2] and (package.hub or "") in row[2]
        assert f"({row[3]})" in package.about
        assert {file for file in package.files if file != "LICENSE"} == set(names(row[1]))
    families = {name.partition("-")[0] for name in HUB if "/" in name}
    assert families == {"EleutherAI/pythia"} and "EleutherAI/pythia" in TEXT and '"gpt2"' in TEXT


def test_every_package_that_is_installed_is_named_once() -> None:
    core = {name for row in ROWS if len(row) == 2 for name in names(row[0])}
    assert requirements(PROJECT["dependencies"]) == core - {card["name"] for card in shipped_models()}
    for extra, group in PROJECT["optional-dependencies"].items():
        said = [name for row in ROWS if row[0] == f"`[{extra}]`" for name in names(row[1])]
        assert sorted(said) == sorted(requirements(group)), extra


INSTALLED = requirements(PROJECT["dependencies"]).union(*map(requirements, PROJECT["optional-dependencies"].values()))


@pytest.mark.parametrize("package", sorted(INSTALLED))
def test_an_installed_package_says_the_same(package: str) -> None:
    try:
        stated = metadata(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    # get_all: where importlib_metadata was imported, a field that is not there raises
    expression, text = ((stated.get_all(field) or [""])[0] for field in ("License-Expression", "License"))
    classifiers = [line for line in stated.get_all("Classifier", []) if line.startswith("License ::")]
    words = " ".join([expression, text[:60], *classifiers])
    if not words.strip():
        pytest.skip(f"{package} says nothing in its metadata; its repository does")
    said = licence_of(package)
    [own] = [re.search(pattern, words) is not None for name, pattern in SPOKEN.items() if said.startswith(name)]
    assert own, (package, said, words)


def test_what_the_site_carries_is_named() -> None:
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    from make import SHIPPED

    assert set(names(TEXT.partition("## What the web site carries")[2])) - {"make site"} == set(SHIPPED)
