"""The demo: the whole way from real pictures to a compared model and a search, on two CPU cores."""
