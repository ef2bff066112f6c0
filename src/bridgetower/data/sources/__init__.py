"""Any source is read as examples: folders, tables, tar shards, videos, repositories, URLs."""
