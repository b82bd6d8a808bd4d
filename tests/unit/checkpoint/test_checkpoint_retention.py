from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.checkpoint import retention
from distdl.checkpoint.read import find_latest
from distdl.checkpoint.retention import clean_temporary, prune, to_remove

SaveStep = Callable[..., Path]
states = st.dictionaries(st.integers(0, 30), st.booleans(), max_size=12)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@given(states, st.integers(1, 5), st.integers(0, 30))
def test_what_is_kept(whole: dict[int, bool], keep: int, saved: int) -> None:
    whole = {**whole, saved: True}
    left = whole.keys() - set(to_remove(whole, keep, saved))
    sound = [s for s in left if whole[s]]
    assert saved in left
    assert len(sound) == min(keep, sum(whole.values()))
    removed_sound = [s for s in to_remove(whole, keep, saved) if whole[s]]
    assert all(r < k for r in removed_sound for k in sound if k != saved)


def test_the_newest_are_kept(save_step: SaveStep, tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save_step(step, keep=2)
    assert names(tmp_path) == ["step-00000300", "step-00000400"]


def test_a_damaged_one_does_not_count(save_step: SaveStep, tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save_step(step)
    (tmp_path / "step-00000300" / "manifest.json").unlink()
    save_step(400, keep=2)
    assert names(tmp_path) == ["step-00000200", "step-00000300", "step-00000400"]
    save_step(500, keep=2)
    assert names(tmp_path) == ["step-00000400", "step-00000500"]


def test_the_one_just_saved_is_kept_though_others_have_higher_steps(
    save_step: SaveStep, tmp_path: Path
) -> None:
    for step in (300, 400, 100):
        save_step(step, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00000400"]


def test_a_removal_cut_short_leaves_nothing_that_looks_like_a_checkpoint(
    save_step: SaveStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(100)
    monkeypatch.setattr(retention, "remove", lambda path: (path / "manifest.json").unlink())
    last = save_step(200, keep=1)
    assert [n.split("-")[:2] for n in names(tmp_path)] == [["step", "00000100.tmp"], ["step", "00000200"]]
    assert find_latest(tmp_path).path == last
    monkeypatch.undo()
    clean_temporary(tmp_path)
    assert names(tmp_path) == ["step-00000200"]


def test_a_link_is_removed_and_not_what_it_leads_to(save_step: SaveStep, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    save_step(100).rename(elsewhere)
    (tmp_path / "step-00000100").symlink_to(elsewhere)
    last = save_step(200)
    assert prune(tmp_path, 1, last) == [tmp_path / "step-00000100"]
    assert names(tmp_path) == ["elsewhere", "step-00000200"]
    assert names(elsewhere)


def test_only_temporary_ones_are_swept(tmp_path: Path) -> None:
    for name in ("step-00000100.tmp-ab", "step-00000100.bad-ab", "step-00000100", "notes.tmp-1", "x.tmp-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert clean_temporary(tmp_path) == [tmp_path / "step-00000100.tmp-ab"]
    assert names(tmp_path) == ["notes.tmp-1", "step-00000100", "step-00000100.bad-ab", "x.tmp-"]
    assert clean_temporary(tmp_path / "never") == []
