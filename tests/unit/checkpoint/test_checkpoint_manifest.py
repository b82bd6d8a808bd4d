from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.checkpoint.manifest import Facts, Manifest, own_hash, parse, seal, serialise, step_name, step_of
from distdl.errors import Corrupt, Incompatible

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
printable = st.text(st.characters(categories=["L", "N", "P"]), max_size=8)
mapping = st.dictionaries(text, plain, max_size=4)
facts = st.builds(
    Facts,
    step=st.integers(0, 10**18 - 1),
    recipe_hash=text,
    mathematics=mapping,
    data_fingerprint=text,
    train_state=mapping,
    engine=text,
    versions=st.dictionaries(text, text, max_size=3),
)
names = st.from_regex(r"[a-z0-9_][a-zA-Z0-9._-]{0,20}", fullmatch=True)
hashes = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
entry = st.fixed_dictionaries({"size": st.integers(4 * 4 * 50**3, 1 << 50), "xxh3_128": hashes})


def pieces(draw: st.DrawFn, files: list[str], numel: int) -> list[list[Any]]:
    """A tensor cut in so many runs at most as there are files."""
    cuts = draw(st.sets(st.integers(1, max(numel - 1, 1)), max_size=len(files) - 1)) if numel > 1 else set()
    ends = [*sorted(cuts), numel]
    return [[f, b, e] for f, b, e in zip(files, [0, *ends], ends, strict=False)]


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = draw(st.dictionaries(names, entry, min_size=1, max_size=3))
    shapes = st.lists(st.integers(0, 50), max_size=3)
    tensors = {}
    for name, shape in draw(st.dictionaries(printable, shapes, max_size=4)).items():
        dtype = draw(st.sampled_from(["float32", "bfloat16", "bool"]))
        tensors[name] = {
            "dtype": dtype,
            "shape": shape,
            "pieces": pieces(draw, sorted(files), math.prod(shape)),
        }
    for file in files.values():
        file["size"] += 50**3 * 4 * 4
    return seal(draw(facts), draw(st.integers(1, 4096)), "2026-01-01T00:00:00+00:00", files, tensors)


def example(**changes: Any) -> dict[str, Any]:
    """The raw JSON of a small manifest, changed and given a hash that is right again."""
    made = seal(
        Facts(3, "abc", {"lr": 1e-05}, "f00d", {"best": float("inf")}, "ddp", {"torch": "2"}),
        1,
        "2026-01-01T00:00:00+00:00",
        {"a.safetensors": {"size": 8, "xxh3_128": "0" * 32}},
        {"model/w": {"dtype": "float32", "shape": [2], "pieces": [["a.safetensors", 0, 2]]}},
    )
    raw = {**json.loads(serialise(made)), **changes}
    return {**raw, "self_hash": own_hash(raw)}


def tensor(**changes: Any) -> dict[str, Any]:
    entry = {"dtype": "float32", "shape": [2], "pieces": [["a.safetensors", 0, 2]]}
    return {"tensors": {"model/w": {**entry, **changes}}}


@settings(max_examples=40)
@given(manifests())
def test_what_is_read_is_what_was_written(manifest: Manifest) -> None:
    assert parse(serialise(manifest)) == manifest


def test_nan_and_tuples_and_number_keys_do_not_break_the_hash() -> None:
    state = {"best": float("nan"), "shape": (2, 3), "by_epoch": {2: 1.0, 10: 2.0}}
    made = seal(Facts(1, "a", {}, "b", state, "ddp"), 1, "now", {}, {})
    back = parse(serialise(made)).train_state
    assert back["shape"] == [2, 3]
    assert back["by_epoch"] == {"2": 1.0, "10": 2.0}
    assert back["best"] != back["best"]


def test_a_flip_of_any_bit_is_noticed_or_changes_nothing() -> None:
    data = json.dumps(example(), indent=1).encode()
    original, noticed = parse(data), 0
    for offset in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[offset // 8] ^= 1 << offset % 8
        try:
            assert parse(bytes(damaged)) == original  # such as 1e-05 and 1E-05
        except Corrupt:
            noticed += 1
    assert noticed > len(data) * 8 * 0.99


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000])
def test_what_is_no_manifest_is_called_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt, match=r"manifest\.json"):
        parse(data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": -1}, "step"),
        ({"step": "3"}, "step"),
        ({"world_size": 0}, "world_size"),
        ({"files": {"../../etc/passwd": {"size": 1, "xxh3_128": "0" * 32}}, "tensors": {}}, "files"),
        ({"files": {}}, "a.safetensors"),
        (
            {"files": {"a.safetensors": {"size": 7, "xxh3_128": "0" * 32}}},
            "8 bytes of tensors in a",
        ),
        (tensor(dtype="float31"), "dtype 'float31' is not one of"),
        (tensor(shape=[-1]), "greater than or equal to 0"),
        (tensor(shape=[3]), "its pieces end at 2, it has 3"),
        (tensor(shape=[1 << 62, 8]), "more than any file holds"),
        (tensor(shape=[1] * 65), "at most 64"),
        (tensor(pieces=[]), "its pieces end at 0"),
        (tensor(pieces=[["a.safetensors", 1, 2]]), r"\[1, 2\), expected one from 0 on"),
        (tensor(pieces=[["a.safetensors", 0, 1]]), "its pieces end at 1"),
        (
            tensor(pieces=[["a.safetensors", 0, 0], ["a.safetensors", 0, 2]]),
            "two pieces of it",
        ),
        (tensor(pieces=[["../a.safetensors", 0, 2]]), "pattern"),
        (tensor(pieces=[["a.safetensors", 0, 2, 0]]), "pieces"),
        (tensor(pieces=[["a.safetensors", False, 2]]), "pieces"),
        ({"tensors": {"\x1b[2J": {"dtype": "bool", "shape": [0], "pieces": []}}}, "cannot be printed"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_by_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Corrupt, match=said):
        parse(json.dumps(example(**changes)).encode())


def test_a_newer_format_is_incompatible_and_not_damaged() -> None:
    with pytest.raises(Incompatible, match="format_version is '3'"):
        parse(json.dumps(example(format_version=3)).encode())


def test_version_1_is_read() -> None:
    old = {"model/w": {"file": "a.safetensors", "dtype": "float32", "shape": [2]}}
    read = parse(json.dumps(example(format_version=1, tensors=old)).encode())
    assert read.tensors["model/w"].pieces == [("a.safetensors", 0, 2)]
    for wrong in ({"file": "a.safetensors", "dtype": "float32"}, None, {**old["model/w"], "shape": ["x"]}):
        with pytest.raises(Corrupt, match="model/w"):
            parse(json.dumps(example(format_version=1, tensors={"model/w": wrong})).encode())


def test_a_key_added_later_is_ignored() -> None:
    assert parse(json.dumps(example(colour="blue")).encode()).step == 3


def test_names_of_steps() -> None:
    assert step_name(300) == "step-00000300"
    assert step_of(step_name(300)) == 300
    assert step_of(step_name(1_234_567_890)) == 1_234_567_890
    for name in ("step-300", "step-0000000300", "step-00000300.tmp-ab", "step-00000300.bad-ab", "latest"):
        assert step_of(name) is None


def test_reading_imports_no_torch() -> None:
    code = "import sys, distdl.checkpoint.read, distdl.checkpoint.retention; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
