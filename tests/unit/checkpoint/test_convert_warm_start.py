"""`init`: which weights a model begins with, and what is said where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from distdl.checkpoint.convert.build import write_checkpoint
from distdl.checkpoint.manifest import Facts
from distdl.comm import World
from distdl.errors import CheckpointError, Corrupt, Incompatible
from distdl.recipe.schema import Init
from distdl.testing import assert_same_bits
from distdl.train.warm_start import WarmStart, other_tokens, warm_start
from tests.unit.checkpoint.convert_support import fresh, trained


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkpoint with optimiser state and averages, which do not matter."""
    model, _ = trained()
    tensors = {f"model/{n}": t for n, t in model.state_dict().items()}
    tensors |= {"ema/head.bias": torch.zeros(10), "optim/exp_avg/head.bias": torch.zeros(10)}
    facts = Facts(5, "ab" * 8, {}, "f00d", {"step": 5}, "ddp")
    return Path(write_checkpoint(str(tmp_path / "run" / "checkpoints"), tensors, facts))


def begun(init: dict[str, Any]) -> tuple[WarmStart, torch.nn.Module]:
    start = warm_start(Init.model_validate(init), World(), lambda: True)
    assert start is not None
    model = fresh(seed=9)
    start(model)
    return start, model


def test_from_a_checkpoint_a_run_and_a_file(place: Path, tmp_path: Path) -> None:
    want = trained()[0].state_dict()
    safetensors.torch.save_file(want, tmp_path / "w.safetensors")
    for source in (place, place.parent, place.parent.parent, tmp_path / "w.safetensors"):
        start, model = begun({"from": str(source)})
        assert_same_bits(model.state_dict(), want)
        assert start.lines()[0].endswith(f": {len(want)} tensors")
        assert len(start.lines()) == 1


def test_only_a_fresh_run_begins_so(place: Path) -> None:
    assert warm_start(Init(), World(), lambda: True) is None
    assert warm_start(Init.model_validate({"from": str(place)}), World(), lambda: False) is None


def test_what_is_left_out_is_said_and_left_as_it_was(place: Path) -> None:
    init = {"from": str(place), "map": {"hidden.*": "wide.*"}, "ignore": ["head.*"], "strict": False}
    start, model = begun(init)
    untouched = fresh(seed=9)
    assert torch.equal(model.head.weight, untouched.head.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(model.hidden.weight, untouched.hidden.weight)  # type: ignore[union-attr,arg-type]
    assert start.lines()[1:] == [
        "not in the source, left as initialised: hidden.weight, hidden.bias",
        "not in the model, left out: wide.bias, wide.weight",
        "ignored: head.bias, head.weight",
    ]
    assert start.facts()["missing"] == ["hidden.weight", "hidden.bias"]


@pytest.mark.parametrize(
    ("init", "kind", "says"),
    [
        ({"map": {"head.*": "haed.*"}}, Incompatible, "missing .* head.weight; did you mean 'haed.weight'"),
        ({"map": {"*": "all.*"}, "strict": False}, Incompatible, "no tensor of .* is in the model"),
        ({"map": {"head.*": "hidden.*", "hidden.*": "head.*"}}, Incompatible, "other shapes: .*head"),
        ({"from": "absent"}, CheckpointError, "there is no such folder"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_touch_nothing(
    place: Path, init: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        begun({"from": str(place), **init})
    if "from" not in init:
        model, init = fresh(seed=9), {"from": str(place), **init}
        with pytest.raises(kind):
            WarmStart(Init.model_validate(init), place)(model)
        assert_same_bits(model.state_dict(), fresh(seed=9).state_dict())


def test_damage_and_pickles_are_refused(place: Path, tmp_path: Path) -> None:
    torch.save(trained()[0].state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="is no safetensors file; `distdl ckpt import`"):
        begun({"from": str(tmp_path / "w.pt")})
    file = next(place.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(Corrupt, match="xxh3-128"):
        begun({"from": str(place)})


def test_weights_of_another_tokenizer_are_said_to_be(tmp_path: Path) -> None:
    for name, text in (("first", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
    run, weights = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000001"
    weights.mkdir(parents=True)

    copied = {"embedding.weight": "embedding.weight"}

    def said(folder: str) -> str | None:
        feed: Any = SimpleNamespace(parts=[SimpleNamespace(folder=tmp_path / folder)])
        start: Any = SimpleNamespace(path=weights, paired=SimpleNamespace(names=copied))
        return other_tokens(start, feed)

    assert said("other") is None  # a checkpoint in no run
    recipe = {
        "task": {"name": "sequence_reconstruction"},
        "model": {"name": "lstm_autoencoder"},
        "data": {"path": str(tmp_path / "first")},
        "batch": {"global": 2, "micro": 1},
        "optim": {"name": "sgd", "lr": 0.1},
        "train": {"max_steps": 1},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    assert said("same") is None
    assert said("nothing") is None  # data of one's own, without a tokenizer
    found = said("other")
    assert found is not None
    assert f"prepare the data with --tokenizer {tmp_path / 'first' / 'tokenizer.json'}" in found
    copied.clear()
    assert said("other") is None  # the embedding is the model's own
    copied["embedding.weight"] = "embedding.weight"
    (tmp_path / "first" / "tokenizer.json").unlink()
    assert said("other") is None
