"""Files made by an adversary: refused with a CheckpointError, at no cost, and nothing else is read."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import SaveStep
from hypothesis import given
from hypothesis import strategies as st

from distdl.checkpoint.dtypes import ITEMSIZE
from distdl.checkpoint.folders import LocalFolder
from distdl.checkpoint.manifest import MANIFEST, own_hash
from distdl.checkpoint.open import open_checkpoint
from distdl.checkpoint.read import find_latest, read_manifest, verify
from distdl.checkpoint.tensorfile import header_of, lay_out, read_header
from distdl.errors import CheckpointError, Corrupt

FILE = "rank-00000-of-00001.safetensors"
HUGE = 2**62


@pytest.fixture
def path(save_step: SaveStep) -> Path:
    return save_step(7)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its own hash right again."""
    raw = json.loads((path / MANIFEST).read_bytes())
    change(raw)
    (path / MANIFEST).write_text(json.dumps({**raw, "self_hash": own_hash(raw)}))


def rewrite_header(path: Path, header: bytes, length: int | None = None) -> None:
    """Another header in front of the same data; the manifest agrees about size and hash."""
    old = (path / FILE).read_bytes()
    data = old[8 + int.from_bytes(old[:8], "little") :]
    size = len(header) if length is None else length
    (path / FILE).write_bytes(size.to_bytes(8, "little") + header + data)
    agree(path)


def agree(path: Path) -> None:
    from distdl.checkpoint.folders import hash_file

    entry = {"size": (path / FILE).stat().st_size, "xxh3_128": hash_file(LocalFolder(path), FILE)}
    rewrite(path, lambda raw: raw["files"].update({FILE: entry}))


@contextmanager
def little_memory(limit: int = 4 << 20) -> Iterator[None]:
    """Fails where Python objects of more than `limit` bytes are alive at once inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def read_whole(path: Path) -> None:
    """What a resume reads: everything."""
    verify(path)
    saved = open_checkpoint(path)
    for name in saved.metas:
        saved.whole(name)


def header(path: Path) -> dict[str, Any]:
    text = (path / FILE).read_bytes()
    found: dict[str, Any] = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
    return found


def test_the_original_is_sound(path: Path) -> None:
    read_whole(path)
    rewrite(path, lambda raw: None)
    rewrite_header(path, json.dumps(header(path)).encode())
    read_whole(path)


W = {"dtype": "F32", "shape": [5, 3], "data_offsets": [8, 68]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "F31"}, "make no sense"),
        ({"dtype": ["F32"]}, "make no sense"),
        ({"shape": [5, -3]}, "make no sense"),
        ({"shape": [5, 4]}, "make no sense"),
        ({"shape": [HUGE, 4]}, "make no sense"),
        ({"shape": ["5", 3]}, "make no sense"),
        ({"shape": 15}, "make no sense"),
        ({"shape": [15]}, r"model/w is float32 \[15\], manifest says float32 \[5, 3\]|^$"),
        ({"data_offsets": [8]}, "make no sense"),
        ({"data_offsets": [0, 60]}, "begins at byte|make no sense"),
        ({"data_offsets": [12, 72]}, "begins at byte 12"),
        ({"data_offsets": [HUGE, HUGE + 60]}, "begins at byte"),
        ({"dtype": "F16", "shape": [5, 6]}, "model/w is float16"),
    ],
)
def test_a_header_that_makes_no_sense(path: Path, change: dict[str, Any], said: str) -> None:
    raw = header(path)
    assert raw["model/w"] == W
    raw["model/w"] = {**W, **change}
    rewrite_header(path, json.dumps(raw).encode())
    verify(path)  # the hashes are right: whoever made it knows how
    if change == {"shape": [15]}:  # a run of all elements stands in one dimension
        assert open_checkpoint(path).whole("model/w").shape == (5, 3)
        return
    with pytest.raises(Corrupt, match=said):
        open_checkpoint(path).whole("model/w")


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (b"", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b"[" * 50_000, None),
        (b"{}", HUGE),
        (b"{}", 2**64 - 1),
        (b"{}" + b" " * 100_000, None),
        (b'{"model/w": 5}', None),
        (b'{"model/w": {"dtype": "F32", "shape": [], "data_offsets": [0, 1e400]}}', None),
    ],
)
def test_a_header_that_is_none(path: Path, text: bytes, length: int | None) -> None:
    rewrite_header(path, text, length)
    with little_memory(), pytest.raises(Corrupt, match=FILE):
        open_checkpoint(path).whole("model/w")


def test_sizes_that_no_file_has_cost_nothing(path: Path) -> None:
    def grow(raw: dict[str, Any]) -> None:
        raw["tensors"]["model/w"].update(shape=[1 << 50], pieces=[[FILE, 0, 1 << 50]])
        raw["files"][FILE]["size"] = 1 << 60

    rewrite(path, grow)
    with little_memory(), pytest.raises(CheckpointError, match="size"):
        verify(path)
    with little_memory(), pytest.raises(CheckpointError, match="size"):
        open_checkpoint(path).whole("model/w")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find_latest(path.parent)


def test_a_manifest_too_large_to_read(path: Path) -> None:
    os.truncate(path / MANIFEST, 1 << 40)  # sparse
    with little_memory(), pytest.raises(Corrupt, match="the most that is read"):
        read_manifest(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/../../secret", ".hid", "a\x00b", ""])
def test_names_that_lead_out_are_refused(path: Path, name: str) -> None:
    (path.parent / "secret").write_bytes((path / FILE).read_bytes())

    def lead_out(raw: dict[str, Any]) -> None:
        raw["files"][name] = raw["files"].pop(FILE)
        for entry in raw["tensors"].values():
            entry["pieces"][0][0] = name

    rewrite(path, lead_out)
    with pytest.raises(Corrupt, match="files"):
        verify(path)


@pytest.mark.parametrize("file", [FILE, MANIFEST])
def test_links_and_pipes_are_not_followed(path: Path, file: str) -> None:
    (path / file).rename(path.parent / "outside")
    (path / file).symlink_to(path.parent / "outside")
    with pytest.raises(Corrupt, match="is a link"):
        verify(path)
    with pytest.raises(Corrupt, match="is a link"):
        open_checkpoint(path).whole("model/w")
    (path / file).unlink()
    os.mkfifo(path / file)
    with pytest.raises(Corrupt, match="not an ordinary file"):
        verify(path)
    (path / file).unlink()
    (path / file).mkdir()
    with pytest.raises(CheckpointError, match=r"ordinary|cannot be read"):
        verify(path)


def junk(random: random.Random, depth: int = 0) -> Any:
    """A JSON value of any kind."""
    values: list[Callable[[], Any]] = [
        lambda: None,
        lambda: random.choice([True, False]),
        lambda: random.choice([-1, 0, 1, 2**31, 2**63, 2**64, 10**30, 15, 60]),
        lambda: random.choice([0.5, -1.0, float("nan"), float("inf"), 1e308]),
        lambda: random.choice(
            ["", "..", "../x", "/etc/passwd", "float32", FILE, "\ud800", "\x1b[2J", "x" * 3000]
        ),
        lambda: [junk(random, depth + 1) for _ in range(random.randrange(4))] if depth < 3 else [],
        lambda: {str(junk(random, 9)): junk(random, depth + 1) for _ in range(3)} if depth < 3 else {},
    ]
    return random.choice(values)()


def spoil(value: Any, random: random.Random) -> Any:
    """`value` with something at some depth replaced, dropped or added."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        kind = random.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, str(junk(random)): value[key]}
        return {**value, key: spoil(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        at = random.randrange(len(value))
        return [*value[:at], *([spoil(value[at], random)] * random.choice([0, 1, 1, 1, 2])), *value[at + 1 :]]
    return junk(random)


def fuzz(path: Path, rounds: int) -> int:
    """Spoil manifest and header again and again; returns how often it was refused."""
    chance, refused = random.Random(5), 0
    original = json.loads((path / MANIFEST).read_bytes())
    file, head = (path / FILE).read_bytes(), header(path)
    outside = path.parent / "x"
    outside.write_bytes(b"outside")
    os.chmod(outside, 0)
    for number in range(rounds):
        (path / FILE).write_bytes(file)
        raw = original
        for _ in range(chance.randrange(1, 4)):
            raw = spoil(raw, chance)
        if number % 2:
            (path / MANIFEST).write_text(json.dumps(original))
            spoilt = head
            for _ in range(chance.randrange(1, 3)):
                spoilt = spoil(spoilt, chance)
            length = chance.choice([None, None, None, 0, 7, 2**63])
            rewrite_header(path, json.dumps(spoilt).encode(), length)
        elif isinstance(raw, dict):
            (path / MANIFEST).write_text(json.dumps({**raw, "self_hash": own_hash(raw)}))
        else:
            (path / MANIFEST).write_text(json.dumps(raw))
        try:
            read_whole(path)
        except CheckpointError:
            refused += 1
    os.chmod(outside, 0o600)
    return refused


def test_fuzzed_manifests_and_headers(path: Path) -> None:
    with little_memory():
        assert fuzz(path, 300) > 150  # some changes are of no consequence: another date


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_ten_thousand_fuzzed_manifests_and_as_many_headers(path: Path) -> None:
    with little_memory():
        assert fuzz(path, 20_000) > 10_000


tensors = st.lists(
    st.tuples(
        st.text(max_size=5), st.sampled_from(sorted(ITEMSIZE)), st.lists(st.integers(0, 5), max_size=3)
    ),
    max_size=6,
    unique_by=lambda t: t[0],
).map(lambda many: [(n, d, tuple(s)) for n, d, s in many if n != "__metadata__"])


@given(tensors)
def test_a_layout_is_aligned_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, layout: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    slots = lay_out(layout)
    head = header_of(slots)
    assert len(head) % 8 == 0
    assert all(slot.begin % ITEMSIZE[slot.dtype] == 0 for slot in slots)
    folder = tmp_path_factory.mktemp("layout")
    data = bytes(slots[-1].end if slots else 0)
    (folder / "file").write_bytes(head + data)
    read = read_header(LocalFolder(folder), "file", len(head) + len(data))
    assert read.slots == {slot.name: slot for slot in slots}
    assert read.data_at == len(head)
    shutil.rmtree(folder)


def test_every_dtype_is_known_to_torch() -> None:
    for name, size in ITEMSIZE.items():
        assert getattr(torch, name).itemsize == size
