"""Turn any source into a sharded dataset; look at it, check it, copy it."""
