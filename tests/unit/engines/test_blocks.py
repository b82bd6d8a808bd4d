"""Which parts of a model are sharded, and which are recomputed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distdl.engines.blocks import blocks, casts_whole, recomputable, sharded_units
from distdl.engines.recompute import recompute_blocks


def names(model: nn.Module, found: list[nn.Module]) -> list[str]:
    by_module = {m: n for n, m in model.named_modules()}
    return [by_module[m] for m in found]


class Model(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def block() -> nn.Module:
    return Model(a=nn.Linear(4, 4), inner=nn.ModuleList([nn.Linear(4, 4)]))


CASES = {
    "elements of a list, however they look inside": (
        Model(embed=nn.Embedding(3, 4), layers=nn.ModuleList([block(), block()]), head=nn.Linear(4, 2)),
        ["embed", "layers.0", "layers.1", "head"],
        ["layers.0", "layers.1"],
    ),
    "a list further down": (
        Model(encoder=Model(embed=nn.Embedding(3, 4), layers=nn.ModuleList([block()])), head=nn.Linear(4, 2)),
        ["encoder.embed", "encoder.layers.0", "head"],
        ["encoder.layers.0"],
    ),
    "stages of a sequence": (
        Model(body=nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Flatten())),
        ["body.0", "body.1"],
        ["body.0"],
    ),
    "layers of a flat sequence, recomputed as a whole": (
        Model(body=nn.Sequential(nn.Linear(4, 4), nn.ReLU()), head=nn.Linear(4, 2)),
        ["body.0", "body.1", "head"],
        ["body"],
    ),
    "recurrent layers": (
        Model(layers=nn.ModuleList([nn.LSTM(4, 4), nn.GRU(4, 4)]), head=nn.Linear(4, 2)),
        ["layers.0", "layers.1", "head"],
        ["layers.0", "layers.1"],
    ),
    "single layers alone": (
        Model(convolutions=nn.ModuleList([nn.Conv2d(1, 2, 3)]), head=nn.Linear(4, 2)),
        ["convolutions.0", "head"],
        [""],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks(case: str) -> None:
    model, units, recomputed = CASES[case]
    assert names(model, blocks(model)) == units
    assert names(model, recomputable(model)) == recomputed


def test_small_and_shared_parts_stay_with_the_root() -> None:
    model = Model(
        embed=nn.Embedding(300, 300),
        tied=nn.Linear(300, 300, bias=False),
        large=nn.Linear(300, 300),
        small=nn.Linear(3, 3),
    )
    model.tied.weight = model.embed.weight
    assert names(model, sharded_units(model)) == ["large"]
    inside = Model(a=nn.Linear(300, 300), b=nn.Linear(300, 300))
    inside.b.weight = inside.a.weight  # shared inside one part: that part's own affair
    model.add_module("layers", nn.ModuleList([inside]))
    assert names(model, sharded_units(model)) == ["large", "layers.0"]
    assert names(model, sharded_units(model, least=9)) == ["large", "small", "layers.0"]


def test_a_module_that_stands_twice_is_one_part() -> None:
    layer = nn.Linear(300, 300)
    model = Model(layers=nn.ModuleList([layer, layer]))
    assert len(blocks(model)) == len(sharded_units(model)) == 1


def test_what_autocast_casts_whole() -> None:
    assert casts_whole(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 2)))
    assert not casts_whole(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    assert not casts_whole(nn.LSTM(2, 2))


def test_recomputation_keeps_names_masks_and_gradients() -> None:
    def gradients(recompute: bool) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model = Model(body=nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)))
        calls = []
        model.body[0].register_forward_hook(lambda *_: calls.append(1))
        if recompute:
            assert recompute_blocks(model) == [model.body]
        torch.manual_seed(1)
        model.body(torch.ones(3, 4)).square().sum().backward()
        assert torch.rand(()) == _after_one_mask()
        with torch.no_grad():
            model.body(torch.ones(3, 4))
        return {n: p.grad for n, p in model.named_parameters()}, len(calls)

    plain, once = gradients(False)
    again, twice = gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert (once, twice) == (2, 3)


def _after_one_mask() -> torch.Tensor:
    torch.manual_seed(1)
    nn.functional.dropout(torch.ones(3, 4), 0.5)
    return torch.rand(())
