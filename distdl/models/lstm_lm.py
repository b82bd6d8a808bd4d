"""`lstm_lm`: token ids to the logits of the token after each, and the state to go on from."""

from __future__ import annotations

from torch import Tensor, nn

from distdl.errors import RecipeError
from distdl.models.cells import make_cell

State = dict[str, Tensor]
"""``h<layer>`` and ``c<layer>``, [N, size of the layer]."""


class LstmLm(nn.Module):
    """Token ids [N, T] (int64), and a state or None for zeros -> logits [N, T, vocabulary], the state after,
    through which no gradient goes back.

    `tied`: the embedding also weighs the outputs (Press and Wolf, 2017, arXiv:1608.05859), and the last layer
    has its size, as in Merity et al. (2018, arXiv:1708.02182). `dropout` acts after the embedding, between
    layers and before the logits, with one mask for all steps of a sequence (Gal and Ghahramani, 2016,
    arXiv:1512.05287); `weight_drop` on the recurrent weights. Raises RecipeError for a `hidden` that no layer
    would have.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int = 200,
        hidden: int = 200,
        layers: int = 2,
        dropout: float = 0.0,
        weight_drop: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if tied and layers == 1 and hidden != embedding:
            raise RecipeError(
                f"model.hidden = {hidden}: with layers = 1 and tied = true the only layer is as wide as the "
                f"embedding, and nothing would be {hidden} wide: set hidden = {embedding} (model.embedding), "
                "layers = 2 or tied = false"
            )
        self.embedding = nn.Embedding(vocabulary, embedding)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        last = embedding if tied else hidden
        sizes = [embedding, *[hidden] * (layers - 1), last]
        self.layers = nn.ModuleList(
            make_cell("lstm", sizes[i], sizes[i + 1], weight_drop) for i in range(layers)
        )
        # Dropout1d drops channels of [N, C, T]: one mask for all T.
        self.dropouts = nn.ModuleList(nn.Dropout1d(dropout) for _ in range(layers + 1))
        self.head = nn.Linear(last, vocabulary)
        nn.init.zeros_(self.head.bias)
        self._sizes = sizes[1:]
        if tied:
            self.head.weight = self.embedding.weight

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """By name, the shape of one sample's state."""
        return {f"{kind}{i}": (size,) for i, size in enumerate(self._sizes) for kind in "hc"}

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x = self.embedding(tokens)
        after: State = {}
        for i, layer in enumerate(self.layers):
            x = _drop(self.dropouts[i], x)
            before = None if state is None else (state[f"h{i}"][None], state[f"c{i}"][None])
            x, (h, c) = layer(x, before)
            after |= {f"h{i}": h[0].detach(), f"c{i}": c[0].detach()}
        logits: Tensor = self.head(_drop(self.dropouts[-1], x))
        return logits, after


def _drop(dropout: nn.Module, x: Tensor) -> Tensor:
    """[N, T, C] with the same channels dropped at every T."""
    dropped: Tensor = dropout(x.transpose(1, 2))
    return dropped.transpose(1, 2)
