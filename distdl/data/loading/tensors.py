"""Gathered columns -> torch tensors: padding, strings, pinned memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distdl.data.table.ragged import Ragged
from distdl.data.table.rows import Batch
from distdl.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Pad = float | Mapping[str, float]
"""What short rows are filled up with: one value, or one for each column (0 where none is given)."""


class Pinned:
    """Makes arrays in page-locked memory, from which a GPU copies while the program goes on."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An `Allocate`."""
        import torch

        tensor = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
        array: npt.NDArray[Any] = tensor.numpy()
        if array.size:
            self._tensors[array.ctypes.data] = tensor
        return array

    def tensor(self, array: npt.NDArray[Any]) -> Tensor:
        """The pinned tensor that `array` is the memory of, or a pinned copy of any other array.

        torch has to be handed its own tensor: it would lose track of copies to the GPU from another one.
        """
        import torch

        made = self._tensors.pop(array.ctypes.data, None)
        if made is not None and made.shape == array.shape:
            return made
        return torch.from_numpy(np.ascontiguousarray(array)).pin_memory()


def to_tensors(batch: Batch, pad: Pad = 0, pinned: Pinned | None = None) -> dict[str, Any]:
    """{column: tensor [n, ...]}, dtypes kept.

    A sequence column is padded to its longest row, [n, longest, ...], with its lengths (int64 [n]) under
    NAME_lengths; lists of lists, [n, most, longest], also have NAME_item_lengths [n, most]. Strings are a
    list of `str`, bytes of `bytes`, nested as the rows are. Raises DataError where one of these names is that
    of another column.
    """
    _check_names(batch)
    found: dict[str, Any] = {}
    for name, column in batch.items():
        if isinstance(column, Ragged):
            found.update(_ragged(name, column, _fill(pad, name), pinned))
        else:
            found[name] = _tensor(column, pinned)
    return found


def to_tensor_parts(batch: Batch, ends: Sequence[int], pad: Pad = 0) -> list[dict[str, Any]]:
    """`to_tensors` of the parts of `batch` that end at rows `ends`; cheaper for many small parts."""
    _check_names(batch)
    parts: list[dict[str, Any]] = [{} for _ in ends]
    for name, column in batch.items():
        if isinstance(column, Ragged):
            for part, rows in zip(parts, column.parts(ends), strict=True):
                part.update(_ragged(name, rows, _fill(pad, name), None))
        else:
            whole = _tensor(column, None)
            for part, start, stop in zip(parts, [0, *ends[:-1]], ends, strict=True):
                part[name] = whole[start:stop]
    return parts


def _check_names(batch: Batch) -> None:
    """Refuse columns of which one would overwrite what is made of another."""
    owners: dict[str, str] = dict.fromkeys(batch, "")
    for name, column in batch.items():
        for made in _made(name, column) if isinstance(column, Ragged) else ():
            if made in owners:
                raise DataError(
                    f"the lengths of column {name!r} would be called {made!r}, as "
                    + (f"those of column {owners[made]!r}" if owners[made] else f"column {made!r} is")
                    + ". Rename one: `distdl data prepare --rename`, or a transform, does that."
                )
            owners[made] = name


def _made(name: str, column: Ragged) -> list[str]:
    """Names of the lengths that `_ragged` adds."""
    if _is_text(column):
        return []
    inner = column.values
    return [f"{name}_lengths", *(_made(f"{name}_item", inner) if isinstance(inner, Ragged) else ())]


def _fill(pad: Pad, name: str) -> float:
    return pad.get(name, 0) if isinstance(pad, Mapping) else pad


def _ragged(name: str, column: Ragged, fill: float, pinned: Pinned | None) -> dict[str, Any]:
    if _is_text(column):
        return {name: column.tolist()}
    lengths = {f"{name}_lengths": _tensor(column.lengths, pinned)}
    inner = column.values
    if isinstance(inner, Ragged):
        parts = _ragged(f"{name}_item", inner, fill, None)
        rows = {k: Ragged(v.numpy(), column.lengths) for k, v in parts.items()}
        padded = {k: _padded(r, 0 if k.endswith("_lengths") else fill, pinned) for k, r in rows.items()}
        return {name: padded.pop(f"{name}_item"), **lengths, **padded}
    return {name: _padded(column, fill, pinned), **lengths}


def _is_text(column: Ragged) -> bool:
    inner = column.values
    return column.text is not None or (isinstance(inner, Ragged) and _is_text(inner))


def _padded(column: Ragged, fill: float, pinned: Pinned | None) -> Tensor:
    return _tensor(column.padded(fill, allocate=pinned), pinned)


def _tensor(array: npt.NDArray[Any], pinned: Pinned | None) -> Tensor:
    import torch

    if pinned is not None:
        return pinned.tensor(array)
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(array)
