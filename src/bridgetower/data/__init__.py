"""Data sets on disk and as training batches: preparation, splits, captions, masking, augmentation."""
