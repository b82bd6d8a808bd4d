"""Data: where it is, in which order it is read, and how a batch is gathered.

Importing this imports neither torch nor datasets; each name below is imported when it is first used, so that
a plan on a login node needs no numpy and no pyarrow either.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distdl.data.catalogue import CATALOGUE
    from distdl.data.dataset import ShardedDataset
    from distdl.data.description import describe_data
    from distdl.data.feed import Feed
    from distdl.data.info import describe
    from distdl.data.loading.loader import Loader, loader
    from distdl.data.loading.microbatches import Share, gather_microbatches
    from distdl.data.loading.prefetch import Prefetcher
    from distdl.data.loading.workers import Workers
    from distdl.data.opening import Ready, cache_folder, open_split, ready
    from distdl.data.order.kinds import Full, Order, make_order
    from distdl.data.table.arrow import ArrowTable
    from distdl.data.table.ragged import Ragged
    from distdl.data.table.rows import ArrayRows, Batch, Rows
    from distdl.data.table.views import Concatenated, Packed

_HOMES = {
    "ArrayRows": "table.rows",
    "ArrowTable": "table.arrow",
    "Batch": "table.rows",
    "CATALOGUE": "catalogue",
    "Concatenated": "table.views",
    "Feed": "feed",
    "Full": "order.kinds",
    "Loader": "loading.loader",
    "Order": "order.kinds",
    "Packed": "table.views",
    "Prefetcher": "loading.prefetch",
    "Ragged": "table.ragged",
    "Ready": "opening",
    "Rows": "table.rows",
    "ShardedDataset": "dataset",
    "Share": "loading.microbatches",
    "Workers": "loading.workers",
    "cache_folder": "opening",
    "describe": "info",
    "describe_data": "description",
    "gather_microbatches": "loading.microbatches",
    "loader": "loading.loader",
    "make_order": "order.kinds",
    "open_split": "opening",
    "ready": "opening",
}
"""Name -> the module below this package that it is from."""

__all__ = [
    "CATALOGUE",
    "ArrayRows",
    "ArrowTable",
    "Batch",
    "Concatenated",
    "Feed",
    "Full",
    "Loader",
    "Order",
    "Packed",
    "Prefetcher",
    "Ragged",
    "Ready",
    "Rows",
    "ShardedDataset",
    "Share",
    "Workers",
    "cache_folder",
    "describe",
    "describe_data",
    "gather_microbatches",
    "loader",
    "make_order",
    "open_split",
    "ready",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
