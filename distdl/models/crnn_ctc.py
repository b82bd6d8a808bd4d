"""`crnn_ctc`: a line of symbols, seen or heard, to logits at every step from left to right."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from distdl.errors import RecipeError
from distdl.models.lstm import RecurrentLayer, mirrored

_POOLS = ((2, 2), (2, 2), (2, 1))


class CrnnCtc(nn.Module):
    """Images [N, C, H, W] -> logits [N, W // 4, num_symbols] (a smaller form of Shi et al., 2017).

    With `features` in the place of `input_shape`, numbers over time [N, T, features] (float, log-mel say, one
    channel as high as there are features) and lengths [N] (int64) -> logits [N, T // 4, num_symbols] and how
    many of the steps are each row's own [N]: a quarter of its length, and at least one. What stands beyond a
    row's length changes nothing of it.

    Three convolutions with normalisation and pooling: by 8 in height, by 4 in width. What is left of the
    height becomes channels, the width becomes time, which bidirectional recurrent layers read. Normalised is
    by BatchNorm; rows of different lengths each place by itself, over its channels, because what fills up the
    short ones would enter the statistics.
    """

    inputs_per_step = 4
    """Columns of an image, or numbers over time, for each step of the logits."""

    def __init__(
        self,
        num_symbols: int,
        in_channels: int = 1,
        input_shape: tuple[int, ...] | None = None,
        features: int | None = None,
        width: int = 32,
        hidden: int = 128,
        layers: int = 1,
        cell: str = "lstm",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        height = features if input_shape is None else input_shape[1]
        assert height is not None, "an image, or numbers over time"
        if height < 8:
            raise RecipeError(
                f"model.name = 'crnn_ctc' makes what it reads smaller by 8 in height, and this has {height} "
                "rows or bands: give images of 8 rows or more, or --mels 8 or more"
            )
        if input_shape is not None and input_shape[2] < self.inputs_per_step:
            raise RecipeError(
                f"model.name = 'crnn_ctc' makes a step of {self.inputs_per_step} columns of an image, and "
                f"these are {input_shape[2]} wide: give images of {self.inputs_per_step} columns or more"
            )
        norm = nn.BatchNorm2d if features is None else ChannelNorm
        channels = [in_channels, width, 2 * width, 4 * width]
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(channels[i], channels[i + 1], 3, padding=1, bias=False),
                    norm(channels[i + 1]),
                    nn.ReLU(),
                    nn.MaxPool2d(pool),
                )
                for i, pool in enumerate(_POOLS)
            )
        )
        size = channels[-1] * (height // 8)
        self.layers = nn.ModuleList(
            RecurrentLayer(cell, 2 * hidden if i else size, hidden, True) for i in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, num_symbols)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if lengths is None:
            x = self.convolutions(x)
            steps = torch.full((len(x),), x.shape[3], device=x.device)
            return self._read(x, steps)
        x, steps = self._convolved(x, lengths)
        return self._read(x, steps), steps

    def _convolved(self, series: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[N, T, features] -> [N, C, features // 8, T // 4]: beyond its own steps each row has zeros, as it
        would if it were alone.
        """
        few = max(self.inputs_per_step - series.shape[1], 0)
        x = functional.pad(series, (0, 0, 0, few)).transpose(1, 2)[:, None]
        x = x * _within(lengths, x)
        for block, (_, by) in zip(self.convolutions, _POOLS, strict=True):
            x = block(x)
            lengths = (lengths // by).clamp(min=1)
            x = x * _within(lengths, x)
        return x, lengths

    def _read(self, x: Tensor, steps: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2).flatten(2)
        mirror = mirrored(steps, x.shape[1])
        for layer in self.layers:
            x = layer(self.dropout(x), mirror)
        logits: Tensor = self.head(self.dropout(x))
        return logits


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation of [N, C, H, W] over the channels of each place (Ba et al., 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _within(lengths: Tensor, x: Tensor) -> Tensor:
    """[N, 1, 1, W] in the type of `x` [N, C, H, W]: 1 where a row has its own columns, 0 beyond."""
    return (torch.arange(x.shape[3], device=x.device) < lengths[:, None])[:, None, None].to(x.dtype)
