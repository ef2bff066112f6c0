"""How good a model is: retrieval, matching and masked words, with metrics as pure functions."""
