"""Data: where it is, in which order it is read, and how a batch is gathered.

Importing this imports neither torch nor datasets.
"""

from distdl.data.catalogue import CATALOGUE
from distdl.data.dataset import ShardedDataset
from distdl.data.feed import Feed, describe_data
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
