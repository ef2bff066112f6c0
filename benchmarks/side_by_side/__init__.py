"""Benchmarks of this package beside its peers: measured in turn, in one process, at the same numbers."""
