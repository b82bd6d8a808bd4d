"""`lstm`, and its kin `gru` and `rnn`: tokens or numbers over time to one vector, and a linear head."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from distdl.models.cells import make_cell

Pooling = Literal["last", "mean", "max", "attention"]


class RecurrentLayer(nn.Module):
    """One layer of a stack: one direction, or two side by side. [N, T, inputs] -> [N, T, size].

    Each direction is an `nn.LSTM` (GRU, RNN) of a single layer, which an engine can shard and overlap by
    itself, and whose weights cuDNN keeps in one piece.
    """

    def __init__(
        self,
        cell: str,
        inputs: int,
        hidden: int,
        bidirectional: bool,
        weight_drop: float = 0.0,
        projection: int | None = None,
    ) -> None:
        super().__init__()
        keys = (cell, inputs, hidden, weight_drop, projection)
        self.onward = make_cell(*keys)
        self.reverse = make_cell(*keys) if bidirectional else None
        self.size = (projection or hidden) * (2 if bidirectional else 1)

    def forward(self, x: Tensor, mirror: Tensor | None) -> Tensor:
        """`mirror` is `mirrored(lengths, T)`; needed for two directions only."""
        outputs: Tensor = self.onward(x)[0]
        if self.reverse is None:
            return outputs
        assert mirror is not None
        backwards = _take(self.reverse(_take(x, mirror))[0], mirror)
        return torch.cat([outputs, backwards], 2)


class AttentionPooling(nn.Module):
    """Steps [N, T, size] and which are real [N, T, 1] (bool) -> [N, size]: their mean, weighed by a score
    that a small network gives each step (Yang et al., 2016, doi:10.18653/v1/N16-1174).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 1, bias=False))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        weights = self.score(x).masked_fill(~real, -torch.inf).softmax(1)
        # What fills up has weight 0, and may be anything: 0 times infinity would not be 0.
        pooled: Tensor = (weights * x.masked_fill(~real, 0.0)).sum(1)
        return pooled


class Recurrent(nn.Module):
    """Token ids [N, T] (int64, filled up with 0) and lengths [N] (int64) -> logits [N, num_outputs].

    With `features` in the place of `vocabulary`, numbers [N, T, features] (float), and a linear map in the
    place of the embedding. Without lengths every row has T steps.

    What stands beyond a row's length changes nothing, in any layer, direction or pooling: rows are not
    packed, which costs more than it saves where lengths are alike; the reverse direction reads each row
    mirrored within its own length, and the pooling looks at real steps alone. A row of length 0 counts as one
    of a single filling token.

    `dropout` acts on every connection that is not recurrent: after the embedding, between layers and before
    the head (Zaremba et al., 2014, arXiv:1409.2329). `pooling` "last" is the state after the last real step;
    of the reverse direction, after the first. `layer_norm` normalises what each layer hands on (Ba et al.,
    2016, arXiv:1607.06450); `weight_drop` and `projection` are those of `make_cell`.
    """

    def __init__(
        self,
        vocabulary: int | None,
        num_outputs: int,
        cell: str = "lstm",
        embedding: int = 128,
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        pooling: Pooling = "last",
        features: int | None = None,
        projection: int | None = None,
        layer_norm: bool = False,
        weight_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = embedding_of(vocabulary, features, embedding)
        self.layers = nn.ModuleList()
        size = embedding
        for _ in range(layers):
            layer = RecurrentLayer(cell, size, hidden, bidirectional, weight_drop, projection)
            self.layers.append(layer)
            size = layer.size
        self.dropouts = nn.ModuleList(nn.Dropout(dropout) for _ in range(layers + 1))
        self.norms = nn.ModuleList(nn.LayerNorm(size) if layer_norm else nn.Identity() for _ in range(layers))
        self.attention = AttentionPooling(size) if pooling == "attention" else None
        self.head = nn.Linear(size, num_outputs)
        self._bidirectional = bidirectional
        self._pooling = pooling

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            lengths = torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)
        lengths = lengths.clamp(min=1)
        mirror = mirrored(lengths, tokens.shape[1]) if self._bidirectional else None
        x = self.embedding(tokens)
        for dropout, layer, norm in zip(self.dropouts, self.layers, self.norms, strict=False):
            x = norm(layer(dropout(x), mirror))
        logits: Tensor = self.head(self.dropouts[-1](self._pool(x, lengths)))
        return logits

    def _pool(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[N, T, C] -> [N, C] over the first `lengths` steps of each row."""
        if self._pooling == "last":
            last = _take(x, lengths[:, None] - 1)[:, 0]
            if not self._bidirectional:
                return last
            half = x.shape[2] // 2
            return torch.cat([last[:, :half], x[:, 0, half:]], 1)
        real = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, :, None]
        if self.attention is not None:
            pooled: Tensor = self.attention(x, real)
            return pooled
        if self._pooling == "max":
            return x.masked_fill(~real, -torch.inf).amax(1)
        return x.masked_fill(~real, 0.0).sum(1) / lengths[:, None]


class ImageRows(nn.Module):
    """Images [N, C, H, W] read from top to bottom, a row of C x W numbers a step, by `Recurrent`."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, cell: str, **keys: Any) -> None:
        super().__init__()
        channels, _, width = input_shape
        self.recurrent = Recurrent(None, num_outputs, cell, features=channels * width, **keys)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.recurrent(images.transpose(1, 2).flatten(2))
        return logits


def embedding_of(vocabulary: int | None, features: int | None, size: int) -> nn.Embedding | nn.Linear:
    """Token ids [N, T], or numbers [N, T, features] -> [N, T, size]."""
    if features is not None:
        return nn.Linear(features, size)
    assert vocabulary is not None, "tokens, or numbers"
    table = nn.Embedding(vocabulary, size)
    # Drawn small: with torch's deviation of 1 what rare words were drawn as is never forgotten.
    nn.init.normal_(table.weight, std=0.1)
    return table


def mirrored(lengths: Tensor, steps: int) -> Tensor:
    """For each row the step whose mirror image within the row's length each step is; filling stays in place.

    lengths [N] (int64) -> [N, steps] (int64). It is its own inverse.
    """
    at = torch.arange(steps, device=lengths.device)
    back = lengths[:, None] - 1 - at
    return torch.where(back >= 0, back, at)


def _take(x: Tensor, steps: Tensor) -> Tensor:
    """[N, T, C], [N, S] -> [N, S, C]: of row n the steps[n]."""
    return x.gather(1, steps[:, :, None].expand(-1, -1, x.shape[2]))
