"""Values that users rely on, kept in files: recipes, defaults, signatures, the HTTP API.

A change of one is meant or a fault. If it is meant: `WRITE_CONTRACTS=1 python -m pytest` with the tests
that call `check_contract`, and look at what git shows.
"""

import json
import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "contracts"


def check_contract(name, value):
    path = FOLDER / f"{name}.json"
    text = json.dumps(value, indent=1, sort_keys=True, default=repr) + "\n"
    if os.environ.get("WRITE_CONTRACTS"):
        path.write_text(text)
    # By parts, so that a failure shows what differs.
    kept = json.loads(path.read_text())
    value = json.loads(text)
    assert list(value) == list(kept)
    for key, entry in value.items():
        assert entry == kept[key], f"{key} of {path} has changed"
