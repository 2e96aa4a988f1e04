"""Which families of models regrow can prune: tiny random ones, pruned and held to what a pruned model must keep.

    python scripts/zoo.py [--write] [FAMILY …]

prints the table of docs/models.md, or writes it there. The tests run the same checks over the same families.

Every family has its LoRA filled, loses heads, channels, experts and a layer, as far as its stock class allows. Then:
masked ≡ cut (logits, LoRA live), merged and saved ≡ reloaded by stock transformers in a fresh process, and it
writes with the KV cache what it writes without.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo_families import FAMILIES

from regrow.checkpoint.offer import ranges
from regrow.checkpoint.save import name_the_class
from regrow.checkpoint.shape import describe
from regrow.checkpoint.stock import Widths, check_fewer_layers, check_free, stock_widths
from regrow.errors import InputError
from regrow.structure.adapters import adapter_parameters, attach_lora, merge_lora
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups

PROBE = Path(__file__).with_name("zoo_probe.py")
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MARK = "<!-- zoo -->"
CLOSE = 1e-4

IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Found:
    """What has been seen of a family, before its checkpoint is reloaded."""

    widths: Mapping[str, Widths]
    no_depth: str
    """Why layers cannot be removed; empty if they can."""
    no_free: str
    """Why layers cannot have widths of their own; empty if they can."""
    changed: float
    """Largest difference of logits that masking makes."""
    difference: float
    """Largest difference of logits between masked and cut."""
    linears: int
    """Linears of a layer that carry LoRA."""
    logits: Tensor
    """Of the cut and merged model."""


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process has seen of a checkpoint."""

    model_class: str
    generates: bool
    regrow_imported: bool
    difference: float
    """Largest difference of logits to those of the model that was saved."""


def build(family: str, seed: int = 0) -> hf.PreTrainedModel:
    """A random model of a family, biases and norms away from their trivial values."""
    torch.manual_seed(seed)
    model: hf.PreTrainedModel = hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.15
            parameter.copy_(scale * torch.randn_like(parameter) + (parameter if parameter.ndim == 1 else 0))
    return model


def with_lora(model: hf.PreTrainedModel) -> Groups:
    """Attach LoRA wherever a run would, factors away from zero; the groups with them in them."""
    groups = find_groups(model)
    experts = dict.fromkeys(groups.experts, 3)
    attach_lora(model, groups.linears, rank=3, alpha=6, dropout=0.0, experts=experts)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return find_groups(model)


def refused(check: Callable[[], object]) -> str:
    """What a check complains of; nothing if it does not."""
    try:
        check()
    except InputError as error:
        return str(error)
    return ""


def logits_of(model: hf.PreTrainedModel) -> Tensor:
    """Of fixed tokens."""
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def some_units(groups: Groups, widths: Mapping[str, Widths], removed: Sequence[int]) -> dict[str, np.ndarray]:
    """For `cut`: of each kind the largest but one possible number of units, at random; none in layers removed."""
    chance = np.random.default_rng(0)
    keep: dict[str, np.ndarray] = {}
    for group in groups:  # experts come before their channels
        counts = widths[group.kind].counts
        count = counts[-2] if len(counts) > 1 else group.units
        experts = keep.get(f"layers.{group.layer}.expert")
        gone = group.expert is not None and experts is not None and group.expert not in experts
        count = 0 if gone or group.layer in removed else count
        keep[group.name] = np.sort(chance.choice(group.units, count, replace=False))
    return keep


def check(family: str, folder: Path) -> Found:
    """Prune a tiny model of a family as far as its stock class allows, and save it."""
    model = build(family)
    groups = with_lora(model)
    widths = stock_widths(model.config, groups)
    no_depth, no_free = (
        refused(lambda: check_fewer_layers(model.config)),
        refused(lambda: check_free(model.config, groups)),
    )
    removed = [] if no_depth else [1]
    keep = some_units(groups, widths, removed)
    whole = logits_of(model)
    with Gates(model, groups.groups, [groups.layers[number] for number in removed]) as gates:
        for number in removed:
            gates.set(groups.layers[number].unit, torch.zeros(1))
        for group in groups:
            gates.keep(group.name, keep[group.name] if group.layer not in removed else range(group.units))
        masked = logits_of(model)
    left = cut(model, groups, keep)
    difference = float((masked - logits_of(model)).abs().max())
    merge_lora(model)
    describe(model, groups, left)
    model.save_pretrained(folder)
    name_the_class(folder, model.config)
    linears = len(groups.linears) // len(groups.layers)
    changed = float((masked - whole).abs().max())
    return Found(widths, no_depth, no_free, changed, difference, linears, logits_of(model))


def reload(folders: Sequence[Path], expected: Sequence[Tensor]) -> list[Reloaded]:
    """Let one fresh process with stock transformers load all checkpoints."""
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch, "ids.safetensors")
        save_file({"ids": IDS}, ids)
        command = [sys.executable, "-P", str(PROBE), str(ids), *map(str, folders)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(child.stderr)
    reports = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    return [
        Reloaded(
            report["class"],
            report["generates"],
            report["regrow_imported"],
            float((load_file(folder / "probe.safetensors")["logits"] - logits).abs().max()),
        )
        for report, folder, logits in zip(reports, folders, expected, strict=True)
    ]


def row(family: str, found: Found, reloaded: Reloaded) -> str:
    """A line of the table."""

    def tick(holds: bool) -> str:
        return "✓" if holds else "✗"

    def width(kind: str) -> str:
        if kind not in found.widths or len(found.widths[kind].counts) == 1:
            return "–"
        one = found.widths[kind]
        if one.counts[0] > 1 and not one.refusal:
            step = one.counts[1] - one.counts[0]
            return f"from {one.counts[0]}" if step == 1 else f"multiples of {step}"
        return "any" if not one.refusal else f"some: {ranges(one.counts)} of {one.counts[-1]}"

    cells = [
        family,
        width("attention"),
        width("ffn"),
        width("expert"),
        "✓" if not found.no_depth else "–",
        "✓" if not found.no_free else "–",
        tick(found.difference < CLOSE < found.changed),
        f"{tick(reloaded.difference < CLOSE and not reloaded.regrow_imported)} {reloaded.model_class}",
        tick(reloaded.generates),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| family | KV heads | FFN channels | experts | layers | free shape | masked ≡ cut | saved ≡ reloaded, as | writes |
|---|---|---|---|---|---|---|---|---|"""


def table(families: Sequence[str], scratch: Path) -> str:
    """The table, one row for each family."""
    folders = [scratch / str(number) for number in range(len(families))]
    found = [check(family, folder) for family, folder in zip(families, folders, strict=True)]
    reloaded = reload(folders, [each.logits for each in found])
    rows = [row(*each) for each in zip(families, found, reloaded, strict=True)]
    return "\n".join([HEADER, *rows])


def main(*arguments: str) -> None:
    """Print the table, or write it into docs/models.md."""
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    families = [argument for argument in arguments if argument != "--write"] or list(FAMILIES)
    with tempfile.TemporaryDirectory() as scratch:
        text = table(families, Path(scratch))
    print(text)
    if "--write" in arguments:
        before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
        PAGE.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
