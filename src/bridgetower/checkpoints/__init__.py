"""Names and bytes: every published checkpoint in, this package's and transformers' folders out."""

from bridgetower.checkpoints.checkpoint import Checkpoint
from bridgetower.checkpoints.fingerprint import fingerprint
from bridgetower.checkpoints.hub import is_downloaded
from bridgetower.checkpoints.io import convert, read_checkpoint, update_weights, write_checkpoint

__all__ = [
    "Checkpoint",
    "convert",
    "fingerprint",
    "is_downloaded",
    "read_checkpoint",
    "update_weights",
    "write_checkpoint",
]
