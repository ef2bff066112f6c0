"""The processor of this machine."""

from __future__ import annotations

import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def cpu_info() -> dict[str, str]:
    """Returns what Linux lists of the first processor, such as `vendor_id` and `flags`; elsewhere nothing."""
    text = _CPU_INFO.read_text() if _CPU_INFO.exists() else ""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """Returns the processor's name, with family and model where they are known: clouds often hide the rest."""
    info = cpu_info()
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']}, family {info.get('cpu family')}, model {info.get('model')}"
