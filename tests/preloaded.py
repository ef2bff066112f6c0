"""What training and evaluation import, also late: processes that are forked after these imports start at once."""

from importlib import import_module

MODULES = (
    "bridgetower.training.run",
    "bridgetower.evaluation.retrieval",
    "bridgetower.evaluation.masked_words",
    "datasets",
    "lancedb",
    "pandas",  # by pyarrow
    "pytest",
    "sklearn.linear_model",
    "sklearn.metrics",
    "torch._dynamo",  # by every optimiser
    "torch._inductor.config",
)


def preload(*others):
    for name in (*MODULES, *others):
        import_module(name)
