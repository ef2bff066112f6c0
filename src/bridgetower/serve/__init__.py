"""An HTTP server for one model, its requests computed together in batches."""
