"""The demo: the whole way from real images to a trained model and a search, on two CPU cores."""
