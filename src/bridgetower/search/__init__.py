"""Search: an index of images on disk, and searches in it."""
