"""The house: who may import whom, and what may not be imported before it is needed."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import distdl

PACKAGE = Path(distdl.__file__).parent
CONFIGS = PACKAGE.parent / "configs"

LAYERS: dict[str, int] = {
    "": 0,  # distdl/__init__.py: the version, and `open_run`
    "version": 0,
    "errors": 0,
    **dict.fromkeys(("recipe", "topology", "keys", "imports", "lifeline"), 1),
    **dict.fromkeys(
        (
            "plan",
            "samples",
            "memory",
            "zero_config",
            "capabilities",
            "comm",
            "pieces",
            "record",
            "stores",
            "testing",
        ),
        2,
    ),
    **dict.fromkeys(("data", "models", "tasks", "engines", "checkpoint"), 3),
    **dict.fromkeys(("observe", "doctor", "train", "launch"), 4),
    **dict.fromkeys(("cli", "__main__"), 5),
}
SIBLINGS = 3
"""The layer whose parts never import each other."""
ORDERED = ["observe", "doctor", "train", "launch"]
"""In layer 4 each may import those before it."""


class Import(NamedTuple):
    """`top`: at the top of the file, so that it happens whenever the file is imported."""

    target: str
    line: int
    top: bool


@functools.cache
def sources() -> dict[str, str]:
    """Dotted name below distdl -> source, of every file; "" is distdl/__init__.py."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


@functools.cache
def packages() -> frozenset[str]:
    return frozenset(".".join(p.parent.relative_to(PACKAGE).parts) for p in PACKAGE.rglob("__init__.py"))


@functools.cache
def imports_of(name: str, source: str, known: frozenset[str], is_package: bool) -> list[Import]:
    """Every import of distdl's own modules: in functions and under TYPE_CHECKING too, and written as a
    string, as for importlib and for what a fork server preloads."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(scope)
    }
    found = []
    for node in ast.walk(tree):
        for target, by_string in _named(node, name, is_package):
            if target == "distdl" or target.startswith("distdl."):
                inner = target.removeprefix("distdl").lstrip(".")
                while inner not in known and inner:  # `from distdl.data import Order` names an attribute
                    inner = inner.rpartition(".")[0]
                found.append(
                    Import(inner, getattr(node, "lineno", 0), id(node) not in inside and not by_string)
                )
    return found


def _named(node: ast.AST, name: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, False) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            here = ["distdl", *filter(None, name.split("."))]
            up = here[: len(here) - node.level + (1 if is_package else 0)]
            base = ".".join([*up, *filter(None, [node.module])])
        yield from ((f"{base}.{alias.name}", False) for alias in node.names)
    elif isinstance(node, ast.Constant) and re.fullmatch(r"distdl(\.\w+)+", str(node.value)):
        yield str(node.value), True


def part(name: str) -> str:
    return name.partition(".")[0]


def allowed(importer: str, found: Import) -> bool:
    mine, theirs = part(importer), part(found.target)
    if mine == theirs:
        return True
    # The test kit runs whole trainings and lends its workers a warm start, but importing it must not do so:
    # inside a function, or as the string that a fork server is given.
    if (mine, theirs) == ("testing", "train"):
        return not found.top
    # `distdl.open_run` fetches what it opens when it is called; not before is tested below.
    if (mine, theirs) == ("", "train"):
        return True
    if LAYERS[mine] != LAYERS[theirs]:
        return LAYERS[theirs] < LAYERS[mine]
    if LAYERS[mine] == SIBLINGS:
        return False
    if mine in ORDERED:
        return ORDERED.index(theirs) < ORDERED.index(mine)
    return True


def violations(files: Mapping[str, str], package_names: frozenset[str]) -> list[str]:
    known = frozenset({*files, *package_names})
    return [
        f"distdl.{name}, line {found.line}, imports distdl.{found.target}"
        for name, source in files.items()
        for found in imports_of(name, source, known, name in package_names)
        if not allowed(name, found)
    ]


def test_imports_point_downwards() -> None:
    assert violations(sources(), packages()) == []


def test_every_part_has_its_layer() -> None:
    assert {part(name) for name in sources()} == set(LAYERS)


def test_the_reader_sees_the_imports() -> None:
    """Guards the test above: some imports known to be there, of every kind."""
    files, known = sources(), frozenset({*sources(), *packages()})
    seen = {name: imports_of(name, text, known, name in packages()) for name, text in files.items()}
    assert ("errors", True) in {(i.target, i.top) for i in seen["keys"] + seen["topology"]}
    assert ("recipe", True) in {(i.target, i.top) for i in seen["plan"]}  # under TYPE_CHECKING
    assert ("train.process", False) in {(i.target, i.top) for i in seen["cli.commands"]}  # in a function
    assert ("train.process", False) in {(i.target, i.top) for i in seen["testing.preload"]}  # in a string
    assert sum(map(len, seen.values())) > 150


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("errors", "from distdl.keys import key"),
        ("keys", "def f():\n    import distdl.plan"),
        ("recipe.load", "from ..plan import Plan"),
        ("plan", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from distdl.data import Order"),
        ("models.cnn5", "from distdl.tasks import Task"),
        ("engines.ddp", "import importlib\nimportlib.import_module('distdl.checkpoint')"),
        ("data.order", "from distdl import models"),
        ("checkpoint.write", "from distdl.train.state import TrainState"),
        ("observe.console", "from distdl.train import loop"),
        ("train.loop", "def f():\n    from distdl.launch import local"),
        ("launch.local", "from distdl.cli import main"),
        ("testing.worlds", "from distdl.train.process import train_process"),
        ("testing.worlds", "def f():\n    from distdl.launch import local"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(name: str, source: str) -> None:
    files = {**sources(), name: source}
    assert [v for v in violations(files, packages()) if v.startswith(f"distdl.{name},")]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cli.commands", "from distdl.train import process"),
        ("train.loop", "from distdl.observe.console import RunConsole\nfrom distdl import __version__"),
        ("launch.worker", "from distdl.train import process"),
        ("testing.worlds", "def f():\n    from distdl.train.process import train_process"),
        ("models.cnn5", "from . import other\nimport torch.distributed"),
    ],
)
def test_an_import_downwards_is_allowed(name: str, source: str) -> None:
    assert violations({**sources(), name: source}, packages()) == []


def test_no_file_imports_itself_through_others() -> None:
    """No cycles among files, counting imports at the top of them. A package stands for its __init__."""
    files, known = sources(), frozenset({*sources(), *packages()})
    graph = {
        name: {i.target for i in imports_of(name, text, known, name in packages()) if i.top} - {name}
        for name, text in files.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(files):
        visit(name, ())


@pytest.mark.parametrize("library", ["datasets", "deepspeed", "accelerate"])
def test_a_wrapped_library_is_imported_in_one_file(library: str) -> None:
    files = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(rf"^\s*(import|from) {library}\b|import_module\(.{library}", path.read_text(), re.M)
    ]
    assert len(files) == (1 if library == "datasets" else len(files[:1])), files


NOT_BEFORE_NEEDED = """
import sys
try:
    {code}
except SystemExit as leaving:
    assert not leaving.code, leaving.code
names = ("torch", "datasets", "deepspeed", "accelerate", "numpy", "pyarrow")
heavy = sorted(m for m in names if m in sys.modules)
assert not heavy, heavy
print("light")
"""


@pytest.mark.parametrize(
    "code",
    [
        "import distdl",
        "import distdl.plan, distdl.topology, distdl.recipe, distdl.record, distdl.testing.faults",
        "import distdl.cli.commands, distdl.data",
        "sys.argv = ['distdl', 'plan', {recipe!r}]; from distdl.cli import main; main()",
        "sys.argv = ['distdl', 'launch', '--dry-run', {recipe!r}]; from distdl.cli import main; main()",
    ],
    ids=["distdl", "plan", "commands", "distdl plan", "distdl launch --dry-run"],
)
def test_a_login_node_needs_no_torch(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTDL_CACHE", str(tmp_path / "cache"))
    text = NOT_BEFORE_NEEDED.format(code=code.format(recipe=str(CONFIGS / "fashion_cnn.yaml")))
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("light\n")
    assert not (tmp_path / "runs").exists()
