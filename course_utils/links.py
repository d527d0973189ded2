"""Where a release of the course is on the web: all of it follows from `[project]` in pyproject.toml.

release = read_release(root)
release.colab("04_induction.ipynb")      the address behind "Open in Colab"
release.download("04_induction.ipynb")   the notebook file itself
"""

import tomllib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit


class Release(NamedTuple):
    """A version of the course; notebooks point at the tag `v` + version, so that they fit the wheel of that version."""

    name: str
    version: str
    repository: str  # its address on GitHub

    @property
    def requirement(self) -> str:
        """What pip is asked for: the wheel of exactly this version."""
        return f"{self.name}=={self.version}"

    @property
    def tag(self) -> str:
        """The tag of this version in the repository."""
        return f"v{self.version}"

    def colab(self, notebook: str) -> str:
        """The address that opens a learner's notebook (`04_induction.ipynb`) in Google Colab."""
        owner_and_name = urlsplit(self.repository).path
        return f"https://colab.research.google.com/github{owner_and_name}/blob/{self.tag}/chapters/{notebook}"

    def download(self, notebook: str) -> str:
        """The address of a learner's notebook as a file."""
        return f"{self.repository}/raw/{self.tag}/chapters/{notebook}"

    def page(self, file: str) -> str:
        """The address of a file of the repository, to be read there."""
        return f"{self.repository}/blob/{self.tag}/{file}"


def read_release(root: Path) -> Release:
    """What the pyproject.toml in this folder says. Raises KeyError where it does not say all of it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return Release(project["name"], project["version"], project["urls"]["Repository"])
