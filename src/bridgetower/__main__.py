"""`python -m bridgetower`, the same as the `bridgetower` command."""

from bridgetower.cli import main

main()
