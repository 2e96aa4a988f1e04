"""Peak memory of serving a checkpoint, measured where nothing else lives: in a process of its own.

Not covered: several devices, and Windows, which has neither of the counters that the probe reads.
"""

import gc
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from regrow.errors import InputError


@dataclass(frozen=True)
class Memory:
    """What loading a checkpoint and answering one batch with it took at its highest point."""

    peak_bytes: int
    """On a CPU: the highest resident memory of the process up to the last token, less what was resident just
    before the weights were loaded, so that Python and the libraries do not count (give or take some ten MB).
    Copies that loading makes do count. On CUDA: the most that torch's allocator handed out, without the
    context that every process pays for."""
    batch: int
    length: int
    """Tokens per sequence at the end, prompt and new ones together."""
    device: str


def measure_memory(
    checkpoint: Path, device: torch.device, batch: int = 1, length: int = 256, trust_remote_code: bool = False
) -> Memory:
    """Load the checkpoint with stock transformers in a fresh process, let it generate, and read the peak.

    The weights keep the type they were saved in. `length` is clipped to the model's positions.

    Args:
        device: to serve it on, if it is a CUDA device; any other is told by what the CPU takes.

    Raises:
        InputError: if the process fails (with its last line of complaint) or is killed.
    """
    probe = Path(__file__).with_name("memory_probe.py")
    where = str(device) if device.type == "cuda" else "cpu"
    command = [sys.executable, "-P", str(probe), str(checkpoint), f"--device={where}"]
    command += [f"--batch={batch}", f"--length={length}"]
    if trust_remote_code:
        command.append("--trust-remote-code")
    if device.type == "cuda":  # what torch keeps for this process later is not there for the other one now
        gc.collect()
        torch.cuda.empty_cache()
    # -P keeps this folder off the child's path: it has file names that other packages might import.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        signal = -done.returncode
        raise InputError(f"serving {checkpoint} was killed by signal {signal}; it may need more memory")
    if done.returncode > 0:
        raise InputError(f"serving {checkpoint} failed: {done.stderr.strip().splitlines()[-1]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))
