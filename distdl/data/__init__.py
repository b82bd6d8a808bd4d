"""Data: where it is, in which order it is read, and how a batch is gathered.

Importing this imports neither torch nor datasets. The functions `prepare` and `augment` are imported from
the modules of the same names, which a function here would hide.
"""

from distdl.data.arrow import ArrowTable, open_split
from distdl.data.catalogue import CATALOGUE
from distdl.data.dataset import ShardedDataset
from distdl.data.feed import Feed, describe_data
from distdl.data.info import describe
from distdl.data.loading import Loader, loader
from distdl.data.microbatches import Share, gather_microbatches
from distdl.data.opening import Ready, cache_folder, ready
from distdl.data.order import Full, Order, make_order
from distdl.data.prefetch import Prefetcher
from distdl.data.ragged import Ragged
from distdl.data.rows import ArrayRows, Batch, Rows
from distdl.data.workers import Workers

__all__ = [
    "CATALOGUE",
    "ArrayRows",
    "ArrowTable",
    "Batch",
    "Feed",
    "Full",
    "Loader",
    "Order",
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
