"""`Feed`: the `data` section of a recipe, opened: rows to train on and to evaluate on, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from distdl.data.description import merge, named, narrowed
from distdl.data.opening import Ready, open_split, ready
from distdl.data.order.kinds import Order, make_order
from distdl.data.table.rows import Rows
from distdl.data.table.views import Concatenated, Packed
from distdl.errors import DataError
from distdl.plan import Plan
from distdl.samples import PACKED, DataInfo, pack_length

if TYPE_CHECKING:
    from distdl.data.stream.remote_rows import Access
    from distdl.recipe.schema import Data, Recipe


@dataclass(frozen=True)
class Feed:
    """The datasets of a recipe, ready to be read; of a mixture, several."""

    data: Data
    parts: Sequence[Ready]

    @classmethod
    def open(cls, data: Data, access: Access | None = None) -> Feed:
        """Prepare what needs it, and open. Any process may call it, alone. Raises DataError.

        What is behind a URL is read as `access` says (`access_of`), and blocks while its server is away.
        """
        return cls(data, [ready(name, path, access) for name, path in named(data)])

    @property
    def info(self) -> DataInfo:
        """What it is, from the indexes."""
        return merge([narrowed(part.info, self.data) for part in self.parts], list(self.data.mixture or ()))

    def rows(self, split: str) -> Rows:
        """The rows of `split`: those of all parts that have it, end to end; packed if the recipe says so.

        Close them (`distdl.data.table.rows.close`): remote ones have threads.
        """
        parts = [part for part in self.parts if split in part.info.rows]
        tables = [open_split(part, split, self.data.columns) for part in parts or self.parts]
        rows: Rows = tables[0] if len(tables) == 1 else Concatenated(tables)
        if self.data.order not in PACKED:
            return rows
        return self._packed(rows, split)

    def order(self, recipe: Recipe, plan: Plan) -> Order:
        """The order of the training rows that the plan settled."""
        split = recipe.data.train_split
        files = self.parts[0].split(split)
        bucketed = plan.order == "length_bucketed"
        if bucketed and plan.sequence not in files.offsets:
            raise DataError(
                f"data.order = 'length_bucketed' needs the lengths of column {plan.sequence!r}, which only a "
                f"prepared dataset stores: run `distdl data prepare` on {self.parts[0].folder}"
            )
        weights = list((self.data.mixture or {}).values())
        parts = [part.info.rows[split] for part in self.parts]
        return make_order(
            "full" if plan.order == "packed" else plan.order,
            seed=recipe.train.seed,
            rows=sum(parts) if weights else plan.train_rows,
            batch=plan.global_batch,
            shard_rows=files.rows,
            offsets=load_offsets(files.offsets[plan.sequence or ""]) if bucketed else None,
            window=self.data.block_window,
            window_batches=self.data.bucket_batches,
            shuffle=self.data.shuffle,
            parts=parts,
            weights=weights,
            epoch_rows=plan.train_rows if weights else None,
        )

    def _packed(self, rows: Rows, split: str) -> Rows:
        files = self.parts[0].split(split)
        column = self.data.sequence or next(n for n in self.info.elements[split])
        length = pack_length(self.data, split)
        return Packed(rows, column, load_offsets(files.offsets[column]), length)


def load_offsets(file: Path) -> npt.NDArray[np.int64]:
    """Offsets of a sequence column, mapped. Raises DataError for a damaged file."""
    try:
        found: npt.NDArray[np.int64] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}. Prepare the dataset again.") from error
    return found
