"""`crnn_ctc`: an image of a line of symbols to logits at every step from left to right."""

from __future__ import annotations

from torch import Tensor, nn

from distdl.models.lstm import RecurrentLayer, mirrored


class CrnnCtc(nn.Module):
    """Images [N, C, H, W] -> logits [N, W // 4, num_symbols] (a smaller form of Shi et al., 2017).

    Three convolutions with normalisation and pooling: by 8 in height, by 4 in width. What is left of the
    height becomes channels, the width becomes time, which bidirectional recurrent layers read.
    """

    def __init__(
        self,
        in_channels: int,
        num_symbols: int,
        input_shape: tuple[int, ...],
        width: int = 32,
        hidden: int = 128,
        layers: int = 1,
        cell: str = "lstm",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels = [in_channels, width, 2 * width, 4 * width]
        pools = [(2, 2), (2, 2), (2, 1)]
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(channels[i], channels[i + 1], 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels[i + 1]),
                    nn.ReLU(),
                    nn.MaxPool2d(pool),
                )
                for i, pool in enumerate(pools)
            )
        )
        size = channels[-1] * (input_shape[1] // 8)
        self.layers = nn.ModuleList(
            RecurrentLayer(cell, 2 * hidden if i else size, hidden, True) for i in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, num_symbols)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convolutions(images).permute(0, 3, 1, 2).flatten(2)
        mirror = mirrored(x.new_full((len(x),), x.shape[1]).long(), x.shape[1])
        for layer in self.layers:
            x = layer(self.dropout(x), mirror)
        logits: Tensor = self.head(self.dropout(x))
        return logits
