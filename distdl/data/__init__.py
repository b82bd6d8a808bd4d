"""Data: where it is, in which order it is read, and how a batch is gathered.

Importing this imports neither torch nor datasets. The functions `prepare` and `augment` are imported from
the modules of the same names, which a function here would hide.
"""

from distdl.data.arrow import ArrowTable, open_split
from distdl.data.catalogue import CATALOGUE, sources
from distdl.data.info import describe
from distdl.data.loader import Prefetcher, Share, gather_microbatches
from distdl.data.order import Order
from distdl.data.prepare import Prepared, cache_folder
from distdl.data.rows import ArrayRows, Batch, Rows

__all__ = [
    "CATALOGUE",
    "ArrayRows",
    "ArrowTable",
    "Batch",
    "Order",
    "Prefetcher",
    "Prepared",
    "Rows",
    "Share",
    "cache_folder",
    "describe",
    "gather_microbatches",
    "open_split",
    "sources",
]
