"""Tasks to train and to measure a model on, in one table. They import no torch."""
