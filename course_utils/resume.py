"""A second sitting: `resume("05")` in the middle of a notebook, after a kernel restart.

Of the cells above it runs what the cells below need, and nothing else: no exercise has to be run by hand, and no demo
runs for its picture alone. After "Run All" everything is there already, and it does nothing.
"""

import re
import tempfile
from pathlib import Path

import nbformat
from IPython import get_ipython

from course_utils.cells import names, plain_python, read_notebook
from course_utils.exercises import course_exercises
from course_utils.notebook import load_notebook, reason
from course_utils.places import own_notebooks, work_folder

MOST_SECONDS = 600.0
JUST_STARTED = 10  # a kernel that has run more cells than these has run those above, in `course run` for instance
STUB = re.compile(r": NotImplementedError: (\w+)")  # what an exercise says that is not written yet


def resume(chapter: str) -> None:
    """Make what the cells below need of the cells above, from the learner's saved notebook; prints what came of it."""
    shell = get_ipython()
    if shell is None:
        return
    paths = own_notebooks(chapter)
    if not paths and len(shell.user_ns.get("In", ())) > JUST_STARTED:
        return
    if not paths:
        print(f"There is no notebook of chapter {chapter} in {work_folder()}: run the cells above this one instead.")
        return
    above, needed = divided(paths[0], chapter)
    missing = needed - shell.user_ns.keys()
    if not missing:
        print("Everything from above is here.")
        return
    print(f"Running what the second half needs of {paths[0].name} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / paths[0].name
        nbformat.write(above, path)
        module = load_notebook(path, missing, seconds=MOST_SECONDS)
    found = {name: value for name, value in vars(module).items() if name in missing - module.__broken__.keys()}
    shell.user_ns.update(found)
    print(f"{len(found)} names are back.")
    optional = {exercise.name for exercise in course_exercises().get(chapter, ()) if exercise.optional}
    skipped = set[str]()
    for name in sorted(missing & module.__broken__.keys()):
        stub = STUB.search(reason(module, name)[1])
        if stub and stub[1] in optional:
            skipped.add(stub[1])
        else:
            print(f"  without {name}: {module.__broken__[name]}")
    if skipped:
        print(
            f"Left out: what needs the optional exercises that you have not written ({', '.join(sorted(skipped))}). "
            "The core path does not need it."
        )


def divided(path: Path, chapter: str) -> tuple[nbformat.NotebookNode, set[str]]:
    """The notebook up to the cell that calls `resume`, and the names that the cells after it need from there."""
    notebook = read_notebook(path)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    calls = f'resume("{chapter}")'
    where = next((number for number, source in enumerate(code) if calls in source), len(code))
    bound, read, anew = set[str](), set[str](), set[str]()
    for number, source in enumerate(code):
        try:
            found = names(plain_python(source))
        except SyntaxError:
            continue
        if number < where:
            bound |= found.bound
        else:
            read |= found.read - anew
            anew |= found.bound
    above = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in code[:where]])
    return above, bound & read
