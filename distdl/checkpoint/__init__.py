"""Checkpoints that any engine at any world size can load, and that exist only once their manifest does.

    write.Saver, find.find_and_verify             all ranks together
    open.open_checkpoint                          any one process: the tensors
    read.find_latest, verify, step_directories    any one process: what is there, and is it sound
    retention.to_remove, prune                    rank 0
    store.store_at                                where they are: LocalStore, ObjectStore

Importing this package imports no torch; `write`, `find`, `open` and `image` do.
"""
