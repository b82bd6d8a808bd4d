"""`image_rnn`: an image as a short sequence of rows, read by blocks of recurrent layers."""

from __future__ import annotations

from torch import Tensor, nn

from distdl.errors import RecipeError
from distdl.models.layers import average_pool
from distdl.models.lstm import RecurrentLayer


class ImageRnn(nn.Module):
    """Images [N, C, H, W] (float) -> logits [N, outputs].

    Colours are averaged, and the image is pooled by averages to `steps` rows of `features` numbers. A linear
    layer makes each row `hidden` wide; then come `blocks` of `layers` recurrent layers each, with a
    normalisation before and a way around each block (He et al., 2016, arXiv:1603.05027); the head sees the
    last state. `outputs` beyond the task's `num_outputs` are never a target.
    """

    def __init__(
        self,
        num_outputs: int,
        steps: int = 28,
        features: int = 28,
        blocks: int = 1,
        layers: int = 1,
        hidden: int = 128,
        cell: str = "lstm",
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        if outputs is not None and outputs < num_outputs:
            raise RecipeError(
                f"model.outputs = {outputs}: the task has {num_outputs} classes; give that many or more, or "
                "leave the key out"
            )
        self._size = (steps, features)
        self.widen = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList(
            nn.ModuleList(RecurrentLayer(cell, hidden, hidden, False) for _ in range(layers))
            for _ in range(blocks)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(blocks))
        self.head = nn.Linear(hidden, outputs or num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        rows = average_pool(images.mean(1), self._size)
        x: Tensor = self.widen(rows)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            y = norm(x)
            for layer in block:  # type: ignore[attr-defined]
                y = layer(y, None)
            x = x + y
        logits: Tensor = self.head(x[:, -1])
        return logits
