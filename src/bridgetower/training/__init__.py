"""Training runs: the loop, the optimiser, the logs, and how a run is resumed."""
