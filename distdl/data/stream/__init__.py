"""Shards that are fetched while they are read, through a bounded cache on disk."""
