"""Search: an index of pictures on disk, and what finds them in it."""
