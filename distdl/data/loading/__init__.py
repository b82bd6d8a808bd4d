"""From rows and an order to batches: ahead in a thread, in worker processes, as tensors."""
