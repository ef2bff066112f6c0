"""Batches of prepared sets: sampling, views, labels, and features of frozen towers."""
