"""Copies of the last snapshot in memory, `checkpoint.replicas: node`: one lost node resumes without a disk.

    nodes     which ranks share a node, and whose copy is where: pure
    home      the folder in a node's memory
    room      how much memory is free
    mapped    a file in memory, as a tensor
    keeper    `Replicas`: what a save does, all ranks together
    search    `Search`: what a resume does, all ranks together

In each node's memory (a tmpfs) lies, laid out as a checkpoint is, what the ranks of this node wrote and what
those of the node before it did. So a process may die, and so may any one node, or any set of nodes no two of
which are neighbours.
"""
