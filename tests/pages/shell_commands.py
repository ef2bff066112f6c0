"""Commands that need files which are not here: those of blocks marked `sh` on a page, or of a script."""

import re
import subprocess

_PRINTING = """
python() { bridgetower "$@"; }
bridgetower() { printf '%s\\t' "$@"; echo; }
torchrun() { test "$1 $2 $3 $4" = "--nproc-per-node 8 -m bridgetower"; shift 4; bridgetower "$@"; }
set -euo pipefail
"""


def commands(page):
    """The arguments of `bridgetower` or `python` in each command of a page or a script. A shell expands its loops."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        text = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    script = _PRINTING + text
    printed = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True
    ).stdout
    return [line.rstrip("\t").split("\t") for line in printed.splitlines()]
