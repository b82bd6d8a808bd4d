"""Names that are not distdl words, and what a user's factory is called with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distdl.errors import RecipeError
from distdl.imports import call_with_known, import_attribute


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory whose modules are forgotten afterwards, path entries included."""
    (tmp_path / "user_parts").mkdir()
    (tmp_path / "user_parts" / "__init__.py").write_text("")
    (tmp_path / "user_parts" / "nets.py").write_text(
        "class Inner:\n    value = 3\n\ndef make_net():\n    return 7\n"
    )
    (tmp_path / "user_broken.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "user_raises.py").write_text("raise ValueError('on import')\n")
    (tmp_path / "user_exits.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("user_")]:
        del sys.modules[name]


def test_an_attribute_of_the_standard_library() -> None:
    assert import_attribute("os.path:join", "model.name") is __import__("os").path.join


def test_the_current_folder_is_searched_and_named_once(folder: Path) -> None:
    assert import_attribute("user_parts.nets:make_net", "model.name")() == 7
    assert import_attribute("user_parts.nets:Inner", "model.name").value == 3
    assert sys.path.count(str(folder)) == 1


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no_such_package:x", "importing 'no_such_package' failed with ModuleNotFoundError"),
        ("user_parts.absent:x", "importing 'user_parts.absent' failed with ModuleNotFoundError"),
        ("user_broken:x", "no_such_module_anywhere"),
        ("user_raises:x", "ValueError: on import"),
        ("user_exits:x", "ZeroDivisionError"),
        ("user_parts.nets:make_nte", "has no attribute 'make_nte'; did you mean 'make_net'?"),
        ("user_parts.nets:zzzzzz", "has no attribute 'zzzzzz'$"),
    ],
)
def test_what_cannot_be_imported(folder: Path, path: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        import_attribute(path, "task.name")
    assert str(caught.value).startswith(f"task.name = {path!r}: ")


def test_where_it_was_looked_for(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"Expected package\.module:attribute") as caught:
        import_attribute("no_such_package:x", "model.name")
    assert str(folder) in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_factory_gets_what_it_has_a_name_for() -> None:
    offered = {"in_channels": 3, "num_outputs": 10, "input_shape": (3, 4, 4)}

    def some(num_outputs: int, width: int) -> Any:
        return num_outputs, width

    def everything(**keys: Any) -> Any:
        return keys

    assert call_with_known(some, offered, {"width": 8}) == (10, 8)
    # A network of a library hands its ** on to one that has other names; a subclass of a task, to its parent.
    assert call_with_known(everything, offered, {"width": 8}) == {"width": 8}
    assert call_with_known(everything, offered, {"width": 8}, into_any=True) == offered | {"width": 8}
    assert call_with_known(lambda: "nothing", offered, {}) == "nothing"
    # The recipe has the last word, and a key that nobody has a name for is not dropped in silence.
    assert call_with_known(some, offered, {"width": 8, "num_outputs": 2}) == (2, 8)
    with pytest.raises(TypeError, match="depth"):
        call_with_known(some, offered, {"width": 8, "depth": 2})


@pytest.mark.parametrize("command", ["doctor", "plan"])
def test_a_file_that_hides_a_module_of_python_is_named(command: str, tmp_path: Path) -> None:
    """`python -m` imports from the current folder first, and fails in the middle of somebody else's code."""
    (tmp_path / "random.py").write_text("print('drawing')\n")
    words = [sys.executable, "-m", "distdl", command]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    said = f"{tmp_path / 'random.py'} hides Python's own module random"
    assert said in (done.stdout if command == "doctor" else done.stderr)
    assert "rename it" in done.stdout + done.stderr


def test_a_file_of_that_name_that_is_in_nobody_s_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "antigravity.py").write_text("")
    words = [sys.executable, "-m", "distdl", "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
