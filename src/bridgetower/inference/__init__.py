"""From inputs to results: items, the predictor, attention maps, vectors of whole sources."""
