"""Helpers of the course Circuits from Scratch; each module is imported by name, so this package alone is cheap."""

import warnings
from pathlib import Path
from typing import Any


def load_ipython_extension(shell: Any) -> None:
    """Run by `%load_ext course_utils`, the first cell of every chapter."""
    from course_utils.shadows import shadows, warning
    from course_utils.unwritten import show_unwritten_kindly

    for path in shadows(Path.cwd()):
        print(warning(Path(path.name)))
    show_unwritten_kindly(shell)
    # tqdm, which comes with other packages, would like a progress bar made of widgets; plain text serves as well.
    warnings.filterwarnings("ignore", message="IProgress not found")
