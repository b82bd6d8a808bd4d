"""Runs under Slurm: the script of a job, its program on the first node, and Slurm's own commands."""
