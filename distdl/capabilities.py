"""What each engine can do, as plain data: the plan reads this table, so nothing asks which engine it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """`equal_counts`: every rank must run the same number of microbatches, since the engine communicates in
    each of them. `needs_one`: every rank must run at least one. `devices` and `precisions` it can train on.
    """

    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    equal_counts: bool
    needs_one: bool


ENGINES: dict[str, Capabilities] = {
    "ddp": Capabilities(
        devices=("cpu", "cuda"), precisions=("fp32", "bf16"), equal_counts=False, needs_one=True
    ),
}
