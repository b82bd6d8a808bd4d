"""Checkpoints that any engine at any world size can load, and that exist only once their manifest does.

    write.save                          all ranks together
    read.find_latest, verify, load_tensors      any one process
    retention.prune, clean_temporary    rank 0

Importing this package imports no torch; importing `write` does.
"""
