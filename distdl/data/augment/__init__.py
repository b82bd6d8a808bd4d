"""Random changes to samples, keyed."""
