"""What a slow test depends on, as a hash: the definitions that it reaches, wherever they stand, and files.

    fingerprint(ref.LayerNorm, check_LayerNorm, survivors, STILL_RIGHT)

A definition reaches those that its names stand for, through the imports of this repository and on; so a change to one
check leaves the others alone. Comments, docstrings, the formatter and moving a definition to another file change
nothing, and neither does the Python that computes it.
"""

import ast
import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("", "docs/site")  # below which `import name` finds a module of ours
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
SHIPPED = ("models", "dictionaries", "transcoders")  # folders of what ships, each in a folder of its own name


def fingerprint(*parts: object) -> str:
    """A hash of functions and classes of ours with all that they reach, of files, and of plain values.

    A path stands for the file's content: that of a module or a notebook for its code and what the code reaches.
    """
    roots: list[Place] = []
    values = []
    for part in parts:
        if isinstance(part, Path) and part.suffix in (".py", ".ipynb"):
            roots += everything(read(part))
        elif isinstance(part, Path):
            values.append(file_digest(part))
        elif callable(part):
            module, name = part.__module__, part.__qualname__.partition(".")[0]  # type: ignore[attr-defined]
            found = imported(module, name)
            if not found:
                raise LookupError(f"fingerprint: {module}.{name} is defined nowhere in this repository")
            roots += found
        elif isinstance(part, Collection) and not isinstance(part, str | bytes):
            values.append(repr(sorted(map(repr, part))))
        else:
            values.append(repr(part))
    text = "\n".join([*sorted(reached(roots)), *values])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chapter_parts(number: str) -> list[object]:
    """What running a chapter's solution notebook depends on: its code, its checks, and the models that it names."""
    from course_utils.checks import find_checks

    notebooks = list((ROOT / "solutions").glob(f"{number}_*.ipynb"))
    text = "".join(notebook.read_text(encoding="utf-8") for notebook in notebooks)
    folders = [path for kind in SHIPPED for path in (ROOT / "course_utils" / kind).iterdir() if path.is_dir()]
    named = [path for path in folders if f'\\"{path.name}\\"' in text]
    files = sorted(path for folder in named for path in folder.rglob("*") if path.is_file())
    return [*notebooks, *find_checks().get(number, {}).values(), *files]


class Code:
    """The top level of a module: the statements that bind a name, and those that run whoever asks."""

    def __init__(self, text: str) -> None:
        self.binding: dict[str, list[ast.stmt]] = defaultdict(list)
        self.always: list[ast.stmt] = []
        for node in without_docstrings(ast.parse(text)).body:
            for part in one_by_one(node):
                names = bound(part)
                for name in names:
                    self.binding[name].append(part)
                if not isinstance(part, (*DEFINITIONS, *IMPORTS)) and not is_plain_assignment(part):
                    self.always.append(part)


Place = tuple[Code, ast.stmt]


def reached(roots: Iterable[Place]) -> set[str]:
    """A hash of every statement at the top of a module that these need, and of what they take from other packages."""
    todo, seen, hashes = list(roots), set[int](), set[str]()
    while todo:
        code, node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if id(code) not in seen:
            seen.add(id(code))
            todo += [(code, statement) for statement in code.always]
        if not (isinstance(node, IMPORTS) and any(targets(node))):  # a module of ours may move
            hashes.add(digest(node))
        names, imports = mentioned(node)
        todo += [(code, statement) for name in names for statement in code.binding.get(name, ())]
        todo += [place for part in imports for places in targets(part) for place in places]
    return hashes


@cache
def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def digest(node: ast.stmt) -> str:
    return hashlib.sha256(json.dumps(shape(node)).encode()).hexdigest()


@cache
def mentioned(node: ast.stmt) -> tuple[set[str], list[ast.Import | ast.ImportFrom]]:
    """The names in a statement, and the imports in it."""
    parts = list(ast.walk(node))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    return names, [part for part in parts if isinstance(part, IMPORTS)]


def targets(node: ast.Import | ast.ImportFrom) -> Iterator[list[Place]]:
    """What each imported name stands for, if it comes from a module of ours."""
    for alias in node.names:
        found = imported(node.module or "", alias.name) if isinstance(node, ast.ImportFrom) else whole(alias.name)
        if found:
            yield found


def imported(module: str, name: str) -> list[Place]:
    """The statements that `from module import name` stands for; none where the module is not ours."""
    path = locate(module)
    if path is None:
        return []
    code = read(path)
    return [(code, node) for node in code.binding.get(name, ())] or whole(f"{module}.{name}") or everything(code)


def whole(module: str) -> list[Place]:
    """All statements of a module of ours."""
    path = locate(module)
    return everything(read(path)) if path else []


def everything(code: Code) -> list[Place]:
    return [(code, node) for nodes in [code.always, *code.binding.values()] for node in nodes]


@cache
def locate(module: str) -> Path | None:
    """The file of a module of this repository."""
    for folder in PACKAGES:
        base = ROOT.joinpath(folder, *module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if module and path.is_file():
                return path
    return None


@cache
def read(path: Path) -> Code:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        from course_utils.cells import plain_python

        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = "\n".join(plain_python("".join(cell["source"])) for cell in cells)
    return Code(text)


def one_by_one(node: ast.stmt) -> list[ast.stmt]:
    """An import of several names as several imports of one."""
    if isinstance(node, ast.ImportFrom):
        return [ast.ImportFrom(node.module, [alias], node.level) for alias in node.names]
    if isinstance(node, ast.Import):
        return [ast.Import([alias]) for alias in node.names]
    return [node]


def bound(node: ast.stmt) -> set[str]:
    """The names that a statement binds or writes into, too many rather than too few."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    if isinstance(node, IMPORTS):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    parts = list(ast.walk(node))
    imports = [alias for part in parts if isinstance(part, IMPORTS) for alias in part.names]
    return {
        *(part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)),
        *(alias.asname or alias.name.partition(".")[0] for alias in imports),
        *(part.name for part in parts if isinstance(part, DEFINITIONS)),
    }


def is_plain_assignment(node: ast.stmt) -> bool:
    """Whether all that a statement does is to give names a value."""
    assigned = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and all(
        isinstance(part, ast.Name | ast.Tuple) for part in assigned
    )


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (*DEFINITIONS, ast.Module)):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                    node.body = rest
    return tree


def shape(node: object) -> object:
    """A tree as nested lists. Not `ast.dump`, whose text differs from one Python to the next."""
    if isinstance(node, ast.JoinedStr):  # some Pythons add empty parts
        node = ast.JoinedStr([part for part in node.values if getattr(part, "value", None) != ""])
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name != "kind" and value not in (None, []))
        return [type(node).__name__, *([name, shape(value)] for name, value in fields)]
    if isinstance(node, list):
        return [shape(part) for part in node]
    return repr(node)
