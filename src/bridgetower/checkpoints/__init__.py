"""Names and bytes: every published checkpoint in, this package's and transformers' folders out."""

from bridgetower.checkpoints.checkpoint import Checkpoint, fingerprint
from bridgetower.checkpoints.hub import HubOptions, Source, is_downloaded
from bridgetower.checkpoints.io import (
    convert,
    push_to_hub,
    read_checkpoint,
    save,
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
    match_text,
)

__all__ = [
    "ITC_ALONE",
    "ITC_WEIGHT",
    "UNMEASURED",
    "Calibration",
    "Checkpoint",
    "Gain",
    "HubOptions",
    "Reranking",
    "Source",
    "convert",
    "fingerprint",
    "is_downloaded",
    "match_text",
    "push_to_hub",
    "read_checkpoint",
    "save",
    "update_weights",
    "write_checkpoint",
    "write_reranking",
]
