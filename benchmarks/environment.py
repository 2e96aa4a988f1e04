"""What a benchmark ran on."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> dict[str, object]:
    """Processor, cores, versions and the date: goes with every figure."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("regrow", "torch", "transformers", "peft")},
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The processor's name."""
    if platform.system() != "Linux":
        return platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes this process has had in memory (Linux)."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
