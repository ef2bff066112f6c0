"""Training runs: recipes, the optimiser, the loop, what is logged, and how a run is resumed."""
