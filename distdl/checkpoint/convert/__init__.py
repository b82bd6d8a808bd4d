"""Between checkpoints and everything else: export, import, compare, average. One process; no collective.

    names.pair_up                   which tensor of one state is which of another
    sources.open_source             what other libraries left behind
    build.import_source, average    new checkpoints
    export.export_weights, graphs   weights, and models, for others to read
    compare.compare, describe       what is in a checkpoint, and between two

Importing this package imports no torch; most of its files do.
"""
