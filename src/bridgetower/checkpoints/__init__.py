"""Names and bytes: every published checkpoint in, this package's and transformers' folders out."""

from bridgetower.checkpoints.checkpoint import ITC_ALONE, Checkpoint
from bridgetower.checkpoints.fingerprint import fingerprint
from bridgetower.checkpoints.hub import is_downloaded
from bridgetower.checkpoints.io import convert, read_checkpoint, update_weights, write_checkpoint, write_itc_weight

__all__ = [
    "ITC_ALONE",
    "Checkpoint",
    "convert",
    "fingerprint",
    "is_downloaded",
    "read_checkpoint",
    "update_weights",
    "write_checkpoint",
    "write_itc_weight",
]
