"""What a finished comparison says: figures over seeds, cost of the models, examples, and one HTML page."""
