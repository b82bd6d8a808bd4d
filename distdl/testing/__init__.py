"""The test kit, for distdl's own tests and for users': worlds of processes, faults on purpose, parity.

run_world(fn, size)                 fn(world, ...) on several ranks
fail_at(rank, point)                break something at a named point
assert_same_bits(a, b), worst(a, b) compare two runs
"""

from typing import Any

__all__ = ["WorldFailed", "assert_same_bits", "fail_at", "run_world", "worst"]

_HOME = {
    "WorldFailed": "worlds",
    "run_world": "worlds",
    "fail_at": "faults",
    "assert_same_bits": "parity",
    "worst": "parity",
}


def __getattr__(name: str) -> Any:
    # Lazy: the product imports distdl.testing.faults, and should not pay for the rest.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
