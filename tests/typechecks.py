"""How the shape annotations are checked while the tests run."""

from beartype import BeartypeConf, beartype

# A whole number is a good value for a field that is a float, as type checkers see it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
