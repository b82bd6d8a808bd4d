"""Beam search over any model that says, token by token, what may come next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]
"""What a step goes on from, by name: [rows * beam, ...]."""

Next = Callable[[Tensor, State], tuple[Tensor, State]]
"""Last tokens [rows * beam] (int64), state -> logits [rows * beam, vocabulary], the state after."""


def beam_search(
    step: Next, state: State, rows: int, *, beam: int, steps: int, bos: int, eos: int, length_penalty: float
) -> Tensor:
    """The best sequence of each row: [rows, steps] (int64), `eos` from its end on. `beam` 1 is greedy.

    Among the `beam` sequences that are kept, that with the largest log-probability over
    ((5 + length) / 6) ** length_penalty is the best (Wu et al., 2016, arXiv:1609.08144). Takes `steps` steps,
    whatever it finds: engines that gather weights in each need as many on every rank.
    """
    device = next(iter(state.values())).device
    tokens = torch.full((rows * beam,), bos, device=device)
    # One of the equal beginnings alone may grow.
    scores = torch.full((rows, beam), -torch.inf, device=device)
    scores[:, 0] = 0
    ended = torch.zeros(rows, beam, dtype=torch.bool, device=device)
    lengths = torch.zeros(rows, beam, device=device)
    found = torch.zeros(rows, beam, 0, dtype=torch.long, device=device)
    first = torch.arange(rows, device=device)[:, None] * beam
    for _ in range(steps):
        logits, state = step(tokens, state)
        logits = logits.float().log_softmax(1).view(rows, beam, -1)
        # What has ended goes on with `eos` alone, at no cost.
        logits = logits.masked_fill(ended[..., None], -torch.inf)
        logits[..., eos] = logits[..., eos].masked_fill(ended, 0.0)
        size = logits.shape[2]
        scores, best = (scores[..., None] + logits).flatten(1).topk(beam, 1)
        parents, chosen = best // size, best % size
        tokens = chosen.flatten()
        state = {name: t.index_select(0, (first + parents).flatten()) for name, t in state.items()}
        found = torch.cat([found.gather(1, parents[..., None].expand_as(found)), chosen[..., None]], 2)
        lengths = lengths.gather(1, parents) + ~ended.gather(1, parents)
        ended = chosen == eos
    winner = (scores / ((5 + lengths) / 6) ** length_penalty).argmax(1)
    return found[torch.arange(rows, device=device), winner]
