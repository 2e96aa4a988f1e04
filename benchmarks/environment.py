"""What a benchmark ran on."""

import datetime
import os
import platform
from importlib.metadata import version

from regrow.evaluation.machine import processor


def describe_machine() -> dict[str, object]:
    """Processor, cores, versions and the date: goes with every figure."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("regrow", "torch", "transformers", "peft")},
        "date": datetime.date.today().isoformat(),
    }
