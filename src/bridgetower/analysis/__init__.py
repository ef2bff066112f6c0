"""What a finished comparison says: metrics over seeds, cost of the models, examples, and one HTML page."""
