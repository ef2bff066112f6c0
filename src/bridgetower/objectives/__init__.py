"""What a model learns from a batch: the paper's objectives, their negatives, and when each is active."""
