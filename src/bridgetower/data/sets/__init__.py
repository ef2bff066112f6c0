"""Prepared sets: how they are written, kept and read, and the originals that they are made from."""
