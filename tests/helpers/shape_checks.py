"""How the shape annotations are checked while the tests run."""

import torch
from beartype import BeartypeConf, FrozenDict, beartype

# A whole number is a good value for a field that is a float, as type checkers see it, and may stand for any while a
# graph is recorded.
numbers = FrozenDict({int: int | torch.SymInt})
checked = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=numbers))
