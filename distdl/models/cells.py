"""Recurrent layers of one direction, each an `nn.RNNBase` of a single layer, with or without weight drop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CELLS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def make_cell(
    cell: str, inputs: int, hidden: int, weight_drop: float = 0.0, projection: int | None = None
) -> nn.RNNBase:
    """A layer [N, T, inputs] -> ([N, T, hidden], its last state).

    `projection` (of "lstm" only) is the size to which a linear map brings each output, which is also what the
    next step sees: [N, T, projection] (Sak et al., 2014, arXiv:1402.1128).

    `weight_drop` is the probability with which, in training, each weight between a state and the next is
    dropped, for a whole sequence at once (DropConnect; Merity et al., 2018, arXiv:1708.02182).
    """
    size = {} if projection is None else {"proj_size": projection}
    # On CPU torch says so once in every process, and nothing can be done about it.
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN", UserWarning)
    if not weight_drop:
        return CELLS[cell](inputs, hidden, batch_first=True, **size)
    made: nn.RNNBase = _DROPPED[cell](inputs, hidden, batch_first=True, **size)
    made.weight_drop = weight_drop
    return made


class _Dropped(nn.RNNBase):
    """Mixed into a layer: its forward with some of `weight_hh_l0` dropped."""

    weight_drop: float
    weight_hh_l0: Tensor
    weight_hr_l0: Tensor
    kernel: Callable[..., Any]

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not self.training:
            return super().forward(input, hx)
        if hx is None:
            zeros = input.new_zeros(1, input.shape[0], self.proj_size or self.hidden_size)
            cells = input.new_zeros(1, input.shape[0], self.hidden_size)
            hx = (zeros, cells) if self.mode == "LSTM" else zeros
        dropped = functional.dropout(self.weight_hh_l0, self.weight_drop)
        weights = [self.weight_ih_l0, dropped, self.bias_ih_l0, self.bias_hh_l0]
        if self.proj_size:
            weights.append(self.weight_hr_l0)
        outputs, *after = type(self).kernel(input, hx, weights, True, 1, 0.0, True, False, True)
        return outputs, tuple(after) if self.mode == "LSTM" else after[0]


class _DroppedLSTM(_Dropped, nn.LSTM):
    kernel = staticmethod(torch.lstm)


class _DroppedGRU(_Dropped, nn.GRU):
    kernel = staticmethod(torch.gru)


class _DroppedRNN(_Dropped, nn.RNN):
    kernel = staticmethod(torch.rnn_tanh)


_DROPPED: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": _DroppedLSTM,
    "gru": _DroppedGRU,
    "rnn": _DroppedRNN,
}
