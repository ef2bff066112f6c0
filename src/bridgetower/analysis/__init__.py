"""The report of a finished comparison: metrics over seeds, cost of the models, examples, and one HTML page."""
