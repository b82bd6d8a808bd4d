"""`seq2seq_lstm`: a bidirectional encoder, and a decoder that attends to all of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distdl.errors import RecipeError
from distdl.models.beam import State, beam_search
from distdl.models.cells import make_cell
from distdl.models.lstm import RecurrentLayer, mirrored


class Seq2SeqLstm(nn.Module):
    """Source ids [N, S], their lengths [N] and target ids [N, T] (all int64) -> logits [N, T, vocabulary].

    Attention with the bilinear ("general") score, after the decoder's layers and without input feeding, so
    that the decoder reads all targets in one call (Luong et al., 2015, arXiv:1508.04025). The decoder begins
    with what the encoder's top layer ends with. `dropout` acts between layers. `tied`: source, target and
    output weights are one.
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        embedding: int = 256,
        hidden: int = 256,
        layers: int = 1,
        dropout: float = 0.2,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if tied and source_vocabulary != target_vocabulary:
            raise RecipeError(
                f"model.tied = true: the source has {source_vocabulary} tokens, the target "
                f"{target_vocabulary}; one vocabulary for both, or tied = false"
            )
        self._layers = layers
        self.target_embedding = nn.Embedding(target_vocabulary, embedding)
        nn.init.normal_(self.target_embedding.weight, std=0.1)
        self.source_embedding = nn.Embedding(source_vocabulary, embedding)
        nn.init.normal_(self.source_embedding.weight, std=0.1)
        sizes = [embedding, *[2 * hidden] * (layers - 1)]
        self.encoder = nn.ModuleList(RecurrentLayer("lstm", size, hidden, True) for size in sizes)
        self.bridge = nn.Linear(2 * hidden, 2 * layers * hidden)
        self.decoder = nn.ModuleList(
            make_cell("lstm", hidden if i else embedding, hidden) for i in range(layers)
        )
        self.score = nn.Linear(2 * hidden, hidden, bias=False)
        self.combine = nn.Linear(3 * hidden, embedding)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(embedding, target_vocabulary)
        if tied:
            self.source_embedding.weight = self.target_embedding.weight
            self.head.weight = self.target_embedding.weight

    def forward(
        self, source: Tensor, lengths: Tensor, target: Tensor | None = None, **search: float
    ) -> Tensor:
        """Without `target`, the sequences [N, steps] that `beam_search` finds with the keys `search`: in one
        call, since engines gather weights at the outermost.
        """
        lengths = lengths.clamp(min=1)
        memory, state = self._encode(source, lengths)
        filled = torch.arange(source.shape[1], device=source.device) >= lengths[:, None]
        if target is not None:
            return self._decode(target, state, memory, self.score(memory), filled)[0]
        return self._search(state, memory, filled, search)

    def _encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        """[N, S, 2 * hidden], and the state that the decoder begins with."""
        mirror = mirrored(lengths, source.shape[1])
        x = self.source_embedding(source)
        for layer in self.encoder:
            x = layer(self.dropout(x), mirror)
        half = x.shape[2] // 2
        last = x[torch.arange(len(x), device=x.device), lengths - 1, :half]
        ends = self.bridge(torch.cat([last, x[:, 0, half:]], 1)).tanh()
        names = [f"{kind}{i}" for i in range(self._layers) for kind in "hc"]
        return x, dict(zip(names, ends.chunk(len(names), 1), strict=True))

    def _decode(
        self, target: Tensor, state: State, memory: Tensor, keys: Tensor, filled: Tensor
    ) -> tuple[Tensor, State]:
        """Logits [N, T, vocabulary] of what follows each target, and the state after the last."""
        x = self.target_embedding(target)
        after: State = {}
        for i, layer in enumerate(self.decoder):
            x, (h, c) = layer(self.dropout(x), (state[f"h{i}"][None], state[f"c{i}"][None]))
            after |= {f"h{i}": h[0], f"c{i}": c[0]}
        scores = (x @ keys.transpose(1, 2)).masked_fill(filled[:, None], -torch.inf)
        context = scores.softmax(2).to(memory.dtype) @ memory
        seen = self.combine(torch.cat([context, x], 2)).tanh()
        logits: Tensor = self.head(self.dropout(seen))
        return logits, after

    def _search(self, state: State, memory: Tensor, filled: Tensor, search: dict[str, float]) -> Tensor:
        beam = int(search["beam"])
        # All sequences of a row look at the same source: it stays in place when they change places.
        state, (memory, filled) = (
            {name: t.repeat_interleave(beam, 0) for name, t in state.items()},
            (memory.repeat_interleave(beam, 0), filled.repeat_interleave(beam, 0)),
        )
        keys = self.score(memory)

        def step(tokens: Tensor, before: State) -> tuple[Tensor, State]:
            logits, after = self._decode(tokens[:, None], before, memory, keys, filled)
            return logits[:, 0], after

        return beam_search(
            step,
            state,
            len(memory) // beam,
            beam=beam,
            steps=int(search["steps"]),
            bos=int(search["bos"]),
            eos=int(search["eos"]),
            length_penalty=search["length_penalty"],
        )
