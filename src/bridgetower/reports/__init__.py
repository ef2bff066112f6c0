"""Pages for readers: a comparison of finished runs, and what a model got wrong."""
