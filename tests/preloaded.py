"""Imports what training and evaluation import, also late: processes that are forked after it start at once."""

import gc
from importlib import import_module

for name in (
    "bridgetower.training.run",
    "bridgetower.tasks.single_tower",
    "bridgetower.evaluation.retrieval",
    "bridgetower.evaluation.masked_words",
    "datasets",
    "pandas",  # by pyarrow
    "pytest",
    "sklearn.linear_model",
    "sklearn.metrics",
    "torch._dynamo",  # by every optimiser
    "torch._inductor.config",
):
    import_module(name)
gc.freeze()  # or each process would copy all of it to look for garbage there
