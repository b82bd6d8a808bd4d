"""Pieces: filled in place whatever their layout, and put together to what they are parts of."""

from __future__ import annotations

import pytest
import torch

from distdl.comm import World
from distdl.engines.ema import WeightAverage, averaged
from distdl.engines.precision import Precision
from distdl.engines.shards import fill, pieces_of
from distdl.errors import Incompatible
from distdl.pieces import InMemory, Piece
from distdl.testing import assert_same_bits
from distdl.testing.whole import gather_whole

ALONE = World()
CPU = torch.device("cpu")


def test_a_piece_is_filled_in_its_own_memory_and_layout() -> None:
    weight = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    saved = InMemory({"weight": torch.randn(2, 3, 4, 4), "flag": torch.tensor(True)})
    flat, flag = torch.zeros(20), torch.tensor(False)
    fill(pieces_of({"weight": weight, "flag": flag}), saved)
    fill({"weight": Piece(flat[5:], (2, 3, 4, 4), 30)}, saved)
    assert torch.equal(weight, saved.whole("weight"))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(flat[5:], saved.whole("weight").view(-1)[30:45])
    assert not flat[:5].any()
    assert flag


def test_pieces_of_any_dtype_make_up_the_whole() -> None:
    wholes = {
        "strided": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": torch.randn(7).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    held = pieces_of({name: wholes[name] for name in ("strided", "empty")})
    held |= {name: Piece(wholes[name].reshape(-1), tuple(wholes[name].shape), 0)
             for name in ("half", "flags", "number")}  # fmt: skip
    found = gather_whole(held, ALONE)
    assert_same_bits(found, wholes)
    found["strided"].zero_()
    assert wholes["strided"].any()


@pytest.mark.parametrize(
    ("begin", "length", "says"),
    [(1, 5, "begins at 1"), (0, 5, "end at 5 of 6"), (0, 7, "end at 7 of 6"), (0, 0, "an empty run")],
)
def test_runs_that_are_not_the_whole_are_told(begin: int, length: int, says: str) -> None:
    with pytest.raises(AssertionError, match=f"weight: .*{says}"):
        gather_whole({"weight": Piece(torch.zeros(length), (2, 3), begin)}, ALONE)


def test_averages_that_a_state_lacks_begin_at_the_weights() -> None:
    weights = {"one": torch.ones(3), "other": torch.ones(2)}
    average = WeightAverage(0.5, weights)
    saved = InMemory(
        {"ema/one": torch.full((3,), 7.0), "model/one": torch.zeros(3), "model/other": torch.zeros(2)}
    )
    weights["other"].fill_(2.0)
    average.check(saved.metas)
    average.load(saved)
    assert average.averages["one"].tolist() == [7.0] * 3
    assert average.averages["other"].tolist() == [2.0] * 2
    assert averaged(saved).whole("model/one").tolist() == [7.0] * 3
    assert averaged(saved).metas.keys() == {"model/one", "model/other"}
    with pytest.raises(Incompatible, match=r"ema/one is \(4,\) in the checkpoint, \(3,\) in the model"):
        average.check(InMemory({"ema/one": torch.ones(4)}).metas)


def test_a_loss_scale_comes_back_and_an_absurd_one_is_refused() -> None:
    one, other = Precision("fp16", CPU), Precision("fp16", CPU)
    assert one.note(float("inf"))
    one.note(1.0)
    other.load(InMemory(gather_whole(one.held(), ALONE)))
    assert_same_bits(gather_whole(other.held(), ALONE), gather_whole(one.held(), ALONE))
    before = other.scale
    other.load(InMemory({}))
    assert other.scale == before
    steps = torch.tensor(0)
    for scale in (torch.tensor(0.5), torch.tensor(float("nan")), torch.ones(2)):
        with pytest.raises(Incompatible, match="loss scale"):
            other.check(InMemory({"scaler/scale": scale, "scaler/good_steps": steps}))
    assert Precision("fp32", CPU).held() == {}
