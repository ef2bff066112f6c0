"""Checks the shape annotations of every call into the package while the tests run."""

from jaxtyping import install_import_hook

# Must come before the first import of the package, so test modules and other conftest files may import it freely.
install_import_hook("bridgetower", "beartype.beartype")
