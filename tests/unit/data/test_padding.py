"""Sequences: how much of a batch is real under each order, and that no order changes what is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distdl.data.order.kinds import Order, make_order

BATCH = 256


def sentence_lengths(rows: int, seed: int = 5) -> np.ndarray:
    """Like tokenised sentences cut at 240 tokens: log-normal, 58 tokens on average."""
    drawn = np.random.default_rng(seed).normal(np.log(60) - 0.32, 0.8, rows)
    return np.clip(np.round(np.exp(drawn)), 1, 240).astype(np.int64)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def real_share(order: Order, lengths: np.ndarray, batch: int) -> float:
    """Real tokens over padded tokens of an epoch."""
    ids = order.ids(0, 0, order.rows)
    padded = 0
    for start in range(0, len(ids), batch):
        chosen = lengths[ids[start : start + batch]]
        padded += int(chosen.max()) * len(chosen)
    return float(lengths[ids].sum() / padded)


def test_bucketed_batches_are_almost_all_real_tokens() -> None:
    lengths = sentence_lengths(200_000)
    full = make_order("full", seed=1, rows=200_000)
    bucketed = make_order(
        "length_bucketed", seed=1, rows=200_000, offsets=offsets_of(lengths), batch=BATCH, window_batches=50
    )
    assert 0.23 < real_share(full, lengths, BATCH) < 0.26
    assert real_share(bucketed, lengths, BATCH) >= 0.95
    # Microbatches of it are no looser: a batch stays sorted.
    assert real_share(bucketed, lengths, BATCH // 8) >= real_share(bucketed, lengths, BATCH)


ROWS = 3000
LENGTHS = sentence_lengths(ROWS, seed=6)
TOKENS = np.random.default_rng(7).integers(1, 50, (ROWS, LENGTHS.max()))


def mean_loss(order: Order, batch: int) -> float:
    """Cross-entropy of the next token, sums and counts over an epoch, at weights that stay as they are."""
    torch.manual_seed(0)
    embed, head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, order.rows, batch):
            ids = order.ids(0, start, min(start + batch, order.rows))
            longest = int(LENGTHS[ids].max())
            tokens = torch.from_numpy(
                np.where(np.arange(longest) < LENGTHS[ids, None], TOKENS[ids, :longest], 0)
            )
            logits = head(torch.tanh(embed(tokens[:, :-1])))
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0, reduction="sum"
            )
            total += loss.item()
            count += int((tokens[:, 1:] != 0).sum())
    return total / count


@pytest.mark.parametrize("kind", ["full", "block", "length_bucketed", "weighted"])
def test_the_mean_loss_of_an_epoch_is_that_of_any_order(kind: str) -> None:
    order = make_order(
        kind,
        seed=3,
        rows=ROWS,
        batch=64,
        shard_rows=[700, 0, 2300],
        window=128,
        offsets=offsets_of(LENGTHS),
        parts=[750, 2250],
        weights=[0.25, 0.75],
    )
    assert mean_loss(order, 64) == pytest.approx(
        mean_loss(make_order("sequential", seed=3, rows=ROWS), 64), rel=1e-6
    )
