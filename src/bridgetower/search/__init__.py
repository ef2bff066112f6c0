"""Search: an index of images on disk, and what finds them in it."""
