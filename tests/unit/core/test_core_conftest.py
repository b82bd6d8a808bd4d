"""The rules in tests/conftest.py catch what they are there for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[2] / "conftest.py"

LEAKS = """
import os, subprocess, sys
import torch, torch.distributed as dist
from hypothesis import given, settings, strategies as st

def test_variable_added():
    os.environ["LEFT_BEHIND"] = "1"

def test_variable_taken_away():
    del os.environ["THERE_BEFORE"]

def test_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)

def test_child():
    global child
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

def test_clean(monkeypatch):
    assert "LEFT_BEHIND" not in os.environ
    assert os.environ["THERE_BEFORE"] == "yes"
    assert not dist.is_initialized()
    monkeypatch.setenv("FOR_A_WHILE", "1")
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)

def test_next():
    assert torch.get_num_threads() == 1

@given(st.text())
def test_property(text):
    assert settings().database is None
"""


@pytest.mark.slow
def test_what_a_test_leaves_behind_fails_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(CONFTEST, pytester.path / "conftest.py")
    pytester.makepyfile(LEAKS)
    monkeypatch.setenv("THERE_BEFORE", "yes")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=7, errors=4)
    result.stdout.fnmatch_lines_random(
        [
            "*LEFT_BEHIND: None -> '1'*",
            "*THERE_BEFORE: 'yes' -> None*",
            "*torch.distributed process group*",
            "*child process * (python*)*",
        ]
    )
    assert not (pytester.path / ".hypothesis").exists()
