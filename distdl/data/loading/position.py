"""Where a loader stands, as plain values: what is saved, and what may be loaded. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from distdl.errors import DataError
from distdl.plan import share

FORMAT = 1
_LONGEST = 100_000
"""Longer fields of an order, offsets say, come from the data, whose fingerprint is checked."""


@dataclass(frozen=True)
class Steps:
    """Which positions each step of a rank holds, counted on from a place in the data over all epochs."""

    used: int
    """Positions of an epoch that are trained on."""
    batch: int
    rank: int
    world_size: int
    epoch: int = 0
    samples: int = 0
    """The first step begins after so many samples of `epoch`."""

    @property
    def per_epoch(self) -> int:
        """Steps of a whole epoch."""
        return -(-self.used // self.batch)

    @property
    def first(self) -> int:
        """Steps that are left of the first epoch."""
        return max(0, -(-(self.used - self.samples) // self.batch))

    def place(self, number: int) -> tuple[int, int]:
        """(epoch, first position of the whole batch) of step `number`."""
        if number < self.first:
            return self.epoch, self.samples + number * self.batch
        epochs, step = divmod(number - self.first, self.per_epoch)
        return self.epoch + 1 + epochs, step * self.batch

    def mine(self, number: int) -> tuple[int, int, int]:
        """(epoch, start, stop): this rank's positions in step `number`, a contiguous run, maybe empty."""
        epoch, start = self.place(number)
        size = min(self.batch, self.used - start)
        lo, hi = share(size, self.rank, self.world_size)
        return epoch, start + lo, start + hi


def describe_order(order: Any) -> str:
    """A line that two orders share only if they are the same kind with the same options."""
    values = []
    for field in dataclasses.fields(order) if dataclasses.is_dataclass(order) else ():
        value = getattr(order, field.name)
        if field.name.startswith("_") or field.name in ("seed", "rows"):
            continue
        if value is None or isinstance(value, bool | int | float | str):
            values.append(f"{field.name}={value}")
        elif isinstance(value, Sequence | np.ndarray) and len(value) <= _LONGEST:
            digest = xxhash.xxh3_64_hexdigest(np.asarray(value).astype(np.float64).tobytes())
            values.append(f"{field.name}:{digest}")
    return f"{type(order).__name__}({', '.join(values)})"


def read_state(state: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[int, int]:
    """(epoch, samples) of a saved state. Raises DataError where it belongs to other data, seed or order."""
    missing = [k for k in ("format", "epoch", "samples", *expected) if k not in state]
    if missing or state["format"] != FORMAT:
        raise DataError(
            f"this is not the state of a distdl loader of format {FORMAT}: {dict(state)!r}; expected what "
            "state_dict() returned"
        )
    for name, why in (
        ("rows", "the data have another number of rows"),
        ("fingerprint", "the data are other data, or changed since"),
        ("seed", "another seed means another order"),
        ("order", "another order: give the loader the same order and order_options, batch included"),
    ):
        if state[name] != expected[name]:
            raise DataError(
                f"the saved position cannot be used here: {why}. {name} is {state[name]!r} in the state and "
                f"{expected[name]!r} in this loader. Use what it was saved with, or start afresh."
            )
    epoch, samples = state["epoch"], state["samples"]
    if not all(isinstance(n, int) and n >= 0 for n in (epoch, samples)) or samples > state["rows"]:
        raise DataError(f"the saved position is damaged: epoch {epoch!r}, samples {samples!r}")
    return epoch, samples
