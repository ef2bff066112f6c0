"""The demo: the whole way from real images to a compared model and a search, on two CPU cores."""
