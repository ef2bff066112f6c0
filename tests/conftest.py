"""Checks the shape annotations of the tensor code at every call while the tests run."""

from jaxtyping import install_import_hook

# Left out are modules that refuse wrong values and shapes with a message of their own, which tests want to see.
CHECKED = [
    "bridgetower.model.bridgetower",
    "bridgetower.model.fusion",
    "bridgetower.model.heads",
    "bridgetower.model.init",
    "bridgetower.model.layers",
    "bridgetower.model.text",
    "bridgetower.model.vision",
    "bridgetower.tasks.losses",
    "bridgetower.tasks.matching",
    "bridgetower.tasks.pretraining",
    "bridgetower.evaluation.masked_words",
    "bridgetower.evaluation.retrieval",
    "bridgetower.data.captions",
]

# Must come before the first import of the package; test modules and other conftest files then import as they like.
install_import_hook(CHECKED, "beartype.beartype")
