"""Names and bytes: every published checkpoint in, this package's and transformers' folders out."""

from bridgetower.checkpoints.checkpoint import Checkpoint, fingerprint
from bridgetower.checkpoints.hub import HubOptions, Source, is_downloaded
from bridgetower.checkpoints.io import (
    convert,
    read_checkpoint,
    update_weights,
    write_checkpoint,
    write_reranking,
)
from bridgetower.checkpoints.reranking import (
    ITC_ALONE,
    ITC_WEIGHT,
    UNMEASURED,
    Calibration,
    Gain,
    Reranking,
    described,
)
from bridgetower.model.bridgetower import BridgeTower

__all__ = [
    "ITC_ALONE",
    "ITC_WEIGHT",
    "UNMEASURED",
    "BridgeTower",
    "Calibration",
    "Checkpoint",
    "Gain",
    "HubOptions",
    "Reranking",
    "Source",
    "convert",
    "described",
    "fingerprint",
    "is_downloaded",
    "read_checkpoint",
    "update_weights",
    "write_checkpoint",
    "write_reranking",
]
