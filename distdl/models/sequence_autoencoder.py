"""`lstm_autoencoder`: a sequence to one vector, its code, and from that back to the sequence.

Dai and Le, "Semi-supervised sequence learning", arXiv:1511.01432. The decoder sees the code and the steps
before, as the conditional one of Srivastava et al., "Unsupervised learning of video representations using
LSTMs", arXiv:1502.04681.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.models.lstm import Pooling, Recurrent, RecurrentLayer, embedding_of

END = 0
"""The token that fills up short rows, which no row has: it ends a row, and stands before its first step."""

State = list[tuple[Tensor, Tensor] | None]
"""Of each layer, what it goes on from; None: zeros."""


class Decoder(nn.Module):
    """Codes [N, code] and the steps before -> outputs at every step. Each step sees the whole code."""

    def __init__(
        self,
        vocabulary: int | None,
        features: int | None,
        embedding: int,
        code: int,
        hidden: int,
        layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = embedding_of(vocabulary, features, embedding)
        sizes = [embedding + code, *[hidden] * (layers - 1)]
        self.layers = nn.ModuleList(RecurrentLayer("lstm", size, hidden, False) for size in sizes)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, vocabulary or features or 0)

    def forward(self, code: Tensor, before: Tensor) -> Tensor:
        """`before` [N, T] or [N, T, features]: what stands one step earlier -> [N, T, outputs]."""
        x = self._seen(code, before)
        for layer in self.layers:
            x = layer(self.dropout(x), None)
        outputs: Tensor = self.head(self.dropout(x))
        return outputs

    def onward(self, code: Tensor, before: Tensor, state: State) -> tuple[Tensor, State]:
        """The same in evaluation, from the state that an earlier call returned; at first []."""
        x, after = self._seen(code, before), []
        for layer, at in zip(self.layers, state or [None] * len(self.layers), strict=True):
            x, reached = layer.onward(x, at)  # type: ignore[operator]
            after.append(reached)
        return self.head(x), after

    def _seen(self, code: Tensor, before: Tensor) -> Tensor:
        x = self.embedding(before)
        return torch.cat([x, code[:, None].expand(-1, x.shape[1], -1)], 2)


class SequenceAutoencoder(nn.Module):
    """Tokens [N, T] (int64) or numbers [N, T, features] (float), and lengths [N] (int64) -> [N, T, outputs].

    Outputs are logits over the vocabulary, or as many numbers as there are features. The output at a step is
    of that very step: the decoder reads the code and the true steps before. `encoder` is the `lstm` of
    classification, whose head makes the code, so that a classifier can begin with its weights.
    """

    def __init__(
        self,
        vocabulary: int | None,
        features: int | None = None,
        code: int = 128,
        embedding: int = 128,
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        pooling: Pooling = "last",
    ) -> None:
        super().__init__()
        self.encoder = Recurrent(
            vocabulary, code, "lstm", embedding, hidden, layers, bidirectional, dropout, pooling, features
        )
        self.decoder = Decoder(vocabulary, features, embedding, code, hidden, layers, dropout)

    def forward(self, sequence: Tensor, lengths: Tensor | None = None) -> Tensor:
        around = (0, 0) * (sequence.ndim - 2)
        before = functional.pad(sequence[:, :-1], (*around, 1, 0), value=END)
        outputs: Tensor = self.decoder(self.encoder(sequence, lengths), before)
        return outputs

    def given_back(self, sequence: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What `generate` makes of the code of each row: as many steps as `sequence` has."""
        return self.generate(self.encoder(sequence, lengths), sequence.shape[1])

    @torch.no_grad()
    def generate(self, code: Tensor, steps: int) -> Tensor:
        """Codes [N, code] -> the likeliest tokens [N, steps] (int64), `END` after the end of each; or numbers
        [N, steps, features]. One step at a time, each after those made before.
        """
        tokens = isinstance(self.decoder.embedding, nn.Embedding)
        shape = (len(code), 1) if tokens else (len(code), 1, self.decoder.head.out_features)
        last = torch.full(shape, END, dtype=torch.int64 if tokens else code.dtype, device=code.device)
        made = last.new_full((len(code), steps, *shape[2:]), END)
        ended = torch.zeros(len(code), 1, dtype=torch.bool, device=code.device)
        state: State = []
        for step in range(steps):
            last, state = self.decoder.onward(code, last, state)
            if tokens:
                last = last.argmax(2).masked_fill(ended, END)
                ended |= last == END
                if ended.all():
                    break
            made[:, step] = last[:, 0]
        return made
