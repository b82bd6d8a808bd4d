from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.checkpoint import local
from distdl.checkpoint.read import find_latest
from distdl.checkpoint.retention import Keep, Known, prune, to_remove
from distdl.checkpoint.store import LocalStore

SaveStep = Callable[..., Path]
states = st.dictionaries(st.integers(0, 30), st.booleans(), max_size=12)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def known(whole: dict[int, bool]) -> dict[int, Known]:
    return {step: Known(ok) for step, ok in whole.items()}


@given(states, st.integers(1, 5), st.integers(0, 30))
def test_what_is_kept(whole: dict[int, bool], keep: int, saved: int) -> None:
    whole = {**whole, saved: True}
    removed = to_remove(known(whole), Keep(keep), saved)
    left = whole.keys() - set(removed)
    sound = [s for s in left if whole[s]]
    assert saved in left
    assert len(sound) == min(keep, sum(whole.values()))
    removed_sound = [s for s in removed if whole[s]]
    assert all(r < k for r in removed_sound for k in sound if k != saved)


entries = st.builds(
    Known,
    whole=st.booleans(),
    saved_at=st.none() | st.floats(0, 100),
    score=st.none() | st.floats(allow_infinity=True, allow_nan=True),
)
keeps = st.builds(
    Keep,
    last=st.integers(1, 4),
    best=st.integers(0, 3),
    every_steps=st.none() | st.integers(1, 9),
    every_s=st.none() | st.floats(1, 50),
)


@given(st.dictionaries(st.integers(0, 30), entries, max_size=12), keeps, st.integers(0, 30))
def test_a_second_look_removes_nothing_more(found: dict[int, Known], keep: Keep, saved: int) -> None:
    found = {**found, saved: Known(True, 101.0)}
    removed = set(to_remove(found, keep, saved))
    left = {s: k for s, k in found.items() if s not in removed}
    assert saved in left
    assert to_remove(left, keep, saved) == []
    # More rules never keep less.
    assert removed <= set(to_remove(found, Keep(keep.last), saved))


def test_each_rule_by_itself() -> None:
    scores = {10: 0.5, 20: 0.9, 30: float("nan"), 40: 0.9, 50: None, 60: 0.1, 70: None}
    found = {s: Known(True, float(s), score) for s, score in scores.items()}
    assert to_remove(found, Keep(1), 70) == [10, 20, 30, 40, 50, 60]
    assert to_remove(found, Keep(1, best=1), 70) == [10, 20, 30, 50, 60]  # the newer of two equally good
    assert to_remove(found, Keep(1, best=3), 70) == [30, 50, 60]
    assert to_remove(found, Keep(1, best=9), 70) == [30, 50]
    assert to_remove(found, Keep(1, every_steps=30), 70) == [10, 20, 40, 50]
    assert to_remove(found, Keep(1, every_s=25), 70) == [20, 30, 50, 60]  # 10, 40, 70
    assert to_remove({**found, 5: Known(False)}, Keep(2, best=9), 70) == [5, 30, 50]


def test_keep_has_to_be_positive() -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        Keep(0)


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
    monkeypatch.setattr(local, "remove", lambda path: (path / "manifest.json").unlink())
    last = save_step(200, keep=1)
    assert [n.split("-")[:2] for n in names(tmp_path)] == [["step", "00000100.tmp"], ["step", "00000200"]]
    assert find_latest(tmp_path).path == last
    monkeypatch.undo()
    LocalStore(tmp_path).sweep()
    assert names(tmp_path) == ["step-00000200"]


def test_a_link_is_removed_and_not_what_it_leads_to(save_step: SaveStep, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    save_step(100).rename(elsewhere)
    (tmp_path / "step-00000100").symlink_to(elsewhere)
    save_step(200)
    assert prune(LocalStore(tmp_path), Keep(1), 200) == [tmp_path / "step-00000100"]
    assert names(tmp_path) == ["elsewhere", "step-00000200"]
    assert names(elsewhere)


def test_only_temporary_ones_are_swept(tmp_path: Path) -> None:
    for name in ("step-00000100.tmp-ab", "step-00000100.bad-ab", "step-00000100", "notes.tmp-1", "x.tmp-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert LocalStore(tmp_path).sweep() == ["step-00000100.tmp-ab"]
    assert names(tmp_path) == ["notes.tmp-1", "step-00000100", "step-00000100.bad-ab", "x.tmp-"]
    assert LocalStore(tmp_path / "never").sweep() == []
