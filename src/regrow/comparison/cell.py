"""One cell of a comparison: `python -m regrow.comparison.cell FOLDER`, a process of its own so that its peak memory
can be told.

Reads `FOLDER.json`, leaves the run in `FOLDER` and what it cost in `FOLDER.cost.json`. Stops, as on SIGTERM, when its
standard input ends: the process that started it holds the other end, and lets go of it
however it ends.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from regrow.checkpoint.files import write_json
from regrow.checkpoint.load import pick_device
from regrow.errors import InputError
from regrow.evaluation.memory_probe import highest, resident
from regrow.recipe import parse_recipe
from regrow.run import prune

DENSE_FILE = "dense.json"
"""In the comparison's folder, for all cells."""


def main(folder: Path) -> None:
    """Run it.

    Raises:
        InputError: as `regrow.prune`.
    """
    request = json.loads(folder.with_name(folder.name + ".json").read_text())
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    recipe, went_on, before = parse_recipe(request["recipe"]), folder.is_dir(), resident()
    prune(request["model"], folder, recipe, dense_file=folder.parents[1] / DENSE_FILE)
    cost = {"peak_bytes_above_imports": highest() - before, "went_on": went_on}
    if (device := pick_device(recipe.device)).type == "cuda":
        cost["cuda_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    write_json(folder.with_name(folder.name + ".cost.json"), cost)


def stop_at_end_of(descriptor: int) -> None:
    """Wait for the end of a pipe, then ask this process to stop."""
    while os.read(descriptor, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=stop_at_end_of, args=(sys.stdin.fileno(),), daemon=True).start()
    try:
        main(Path(sys.argv[1]))
    except InputError as error:
        print("regrow:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
