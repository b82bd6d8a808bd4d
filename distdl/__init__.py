"""distdl: write a training run once; run it anywhere, through any failure, and get the same run.

Importing this package does not import torch, so that `distdl plan` works on a login node.
"""

__version__ = "0.1.0"
