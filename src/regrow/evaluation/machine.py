"""What figures were measured on."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("accelerate", "tokenizers", "datasets", "safetensors", "numpy")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """The machine and everything on it that can change a figure.

    Args:
        processes: how many took part in the run.
    """
    found = machine(device)
    return {
        **found,
        "processes": processes,
        "processor": processor(),
        "logical processors": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        **{name: version(name) for name in PACKAGES},
    }


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process holds now: of the device's memory, or of main memory if that is no GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def processor() -> str:
    """The processor's name, where the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
