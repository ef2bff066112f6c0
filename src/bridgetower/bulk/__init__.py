"""Vectors of many images and texts: any source in, in blocks; files, Lance tables and indexes out."""
