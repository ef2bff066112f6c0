"""Names of the classes that the downstream heads tell apart, by head; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping

# Official order of the classes (`write_snli.py`; NLVR2's files hold these very strings).
FIXED = {"snli_ve": ("contradiction", "neutral", "entailment"), "nlvr2": ("False", "True")}


def check_labels(source: str, labels: Mapping[str, tuple[str, ...]], counts: Mapping[str, int]) -> None:
    """Raises ValueError unless the labels of every head are distinct, and as many as its classes.

    Args:
        source: Named in the error.
        labels: Names by head.
        counts: Classes by head.
    """
    for head, names in labels.items():
        if len(set(names)) != len(names) or len(names) != counts.get(head, 0):
            raise ValueError(
                f"{source} has {len(set(names))} different names among {len(names)} for the {counts.get(head, 0)} "
                f"classes of its {head} head; expected one for each, in the order of the classes"
            )
