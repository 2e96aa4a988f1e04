"""What two processes do together: `torchrun --nproc-per-node 2 tests/together.py FOLDER prune …`.

Trainings, each of which leaves in FOLDER, as JSON, what `outcome` tells of it; `test_processes.py` has them done by one
process, too. Then whatever follows, as `torchrun -m regrow prune …` would do it.
"""

import json
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from conftest import QUICK
from test_resume import Calling, Fault, corpus, dense, fail_at, known_groups, windows

import regrow
from regrow.analysis.sensitivity import measure_sensitivity
from regrow.checkpoint.journal import Forgetful, Journal
from regrow.checkpoint.load import load_model
from regrow.checkpoint.offloaded import load_offloaded
from regrow.checkpoint.originals import Originals
from regrow.checkpoint.shared import shared
from regrow.planning.sensitivity import Conditions
from regrow.processes import ALONE, Processes, join
from regrow.progress import Silent
from regrow.recipe import Recipe, load_recipe
from regrow.recovery.learner import attach
from regrow.recovery.outcome import Trained
from regrow.recovery.train import train
from regrow.settings import Lora
from regrow.structure.adapters import adapter_parameters, attach_lora

COMMON = {
    "training.steps": 5,
    "training.batch_size": 3,
    "training.eval_interval": 2,
    "training.learning_rate": 1e-2,
    "pruning.calibration_batches": 2,
    "lora.dropout": 0.0,
    "search.windows": 2,
    "search.judge_windows": 2,
    "compensation.windows": 4,
}
"""Three sequences on two processes: one has twice as many as the other."""
WORK: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loraprune": ("loraprune", "llama-gqa", {"pruning.interval": 2, "training.accumulate": 2}),
    "regrow": ("regrow", "llama-gqa", {"search.evaluations": 3, "pruning.decay_steps": 2}),
    "lorashear": ("lorashear", "llama-gqa", {
        "analysis.enabled": False, "pruning.allocation": "by-kind", "pruning.periods": 2, "recovery.interval": 2,
        "recovery.instruct_share": 0.5,
    }),
    "cached": ("llm-pruner", "Mixtral", {
        "distillation.weight": 0.5, "distillation.teacher": "cached", "pruning.kinds": ["ffn", "expert", "layer"],
        "pruning.protect_first": 0.0, "pruning.protect_last": 0,
    }),
    "layers": ("shortgpt", "llama-gqa", {
        "distillation.hidden_weight": 0.5, "pruning.protect_first": 0.0, "pruning.protect_last": 0,
    }),
    "biases": ("flap", "llama-gqa", {}),
    "prefix": ("wanda-sp", "llama-gqa", {}),
    "probes": ("mini-llm", "llama-gqa", {}),
    "squares": ("llm-pruner", "llama-gqa", {"pruning.criterion": "taylor-mix"}),
    "interactions": ("regrow", "llama-gqa", {
        "search.evaluations": 0, "pruning.interactions": 2.0, "pruning.criterion": "repairable-fisher",
    }),
}  # fmt: skip
"""Name -> recipe, family, settings: between them, everything that is measured on batches."""
SHARDED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loraprune": WORK["loraprune"],
    "regrow": ("regrow", "llama-gqa", {"search.evaluations": 3, "compensation.carrier": "adapter"}),
    "lorashear": WORK["lorashear"],
    "taught": ("random", "llama-gqa", {"distillation.weight": 0.5, "distillation.hidden_weight": 0.5}),
    "experts": ("random", "Mixtral", {"pruning.kinds": ["attention", "ffn", "expert"], "pruning.sparsity": 0.4}),
    "prefix": WORK["prefix"],
}  # fmt: skip
"""The same, with the weights in parts: everything that reads weights, or runs the model for a part of the processes."""
CHANGES = {**QUICK, "training.batch_size": 3, "training.eval_interval": 2, "evaluation.completions": 0}
DROPPED_OUT = "loraprune", "llama-gqa", {"pruning.interval": 2, "lora.dropout": 0.2, "training.checkpoint_interval": 2}


def session(
    work: tuple[str, str, dict[str, Any]],
    folder: Path,
    processes: Processes = ALONE,
    on_step: Callable[[int], None] = lambda step: None,
    offload: str = "none",
) -> Trained:
    """Train from what the folder's journal knows.

    Args:
        offload: disk, shards: where the weights lie, with `training.offload`.
    """
    name, family, settings = work
    recipe: Recipe = load_recipe(name, {**COMMON, **settings})
    groups = known_groups(family)  # first, for it uses chance up
    model = dense(family)
    if offload != "none":
        with processes.main_first():
            if processes.is_main:
                model.save_pretrained(folder / "dense")
        model = load_offloaded(str(folder / "dense"), torch.device("cpu"), offload, processes=processes)
        recipe = recipe.override({"training.gradient_checkpointing": True, "training.offload": offload})
        torch.manual_seed(0)
    attach(model, groups, Lora(rank=3, alpha=6, dropout=recipe.lora.dropout))
    processes.begin_alike(adapter_parameters(model), recipe.seed)
    progress = Calling(on_step)
    journal = shared(Journal(folder, progress.say) if processes.is_main else Forgetful(), processes)
    return train(
        model, groups, recipe, corpus(name), progress, teacher_folder=folder / "teacher",
        on_cut=lambda event: None, on_validation=lambda history: None, journal=journal, processes=processes,
    )  # fmt: skip


def outcome(done: Trained) -> dict[str, Any]:
    """What a training has come to, as far as it can be compared."""
    sums = {name: float(tensor.double().square().sum()) for name, tensor in done.adapters.items()}
    steps = [{key: value for key, value in step.items() if key != "seconds"} for step in done.history.steps]
    return {
        "plan": done.plan.model_dump(mode="json"),
        "numbers": {"steps": steps, "validations": done.history.validations, "mixture": done.history.mixture},
        "adapters": sums,
    }


def sensitivity(processes: Processes = ALONE) -> dict[str, Any]:
    """Losses of groups pruned alone, on three windows."""
    groups = known_groups("llama-gqa")
    conditions = Conditions(
        model_sha256="", dtype="", tokens_sha256="", windows=3, length=10, calibration_sha256="", calibration_batches=1,
        batch_size=2, seed=0, criterion="", scoring_sha256="", shares=(0.5,),
    )  # fmt: skip
    model, scores = dense("llama-gqa"), {group.name: torch.arange(group.units) for group in groups}
    found = measure_sensitivity(
        model, groups, scores, windows(3, 0), (0.5,), Silent(), conditions=conditions, processes=processes
    )
    return found.to_json()


def check_adding(us: Processes) -> None:
    """Sums and gradients, of which some processes have none."""
    own = torch.arange(5.0)[us.rows(5)]
    assert len(own) == 2 + us.rank
    assert us.sum([float(own.sum()), 1.0]) == [10.0, 2.0]
    large, small = torch.full((2**17,), 1.0 + us.rank), torch.full((2, 2), us.rank, dtype=torch.long)
    us.add([large, small.T])
    assert large.eq(3).all()
    assert small.eq(1).all()
    mine, theirs, nobodys = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    (mine if us.is_main else theirs).grad = torch.ones(2)
    us.add_gradients([mine, theirs, nobodys])
    assert mine.grad is not None
    assert theirs.grad is not None
    assert nobodys.grad is None
    found = us.gather({f"of {us.rank}": own})
    assert [list(each) for each in found] == ([["of 0"], ["of 1"]] if us.is_main else [])
    assert us.by_main(lambda: [us.rank, float("inf")]) == [0, float("inf")]
    assert us.any(us.rank == 1)
    assert not us.any(False)


def check_resuming(us: Processes, folder: Path) -> None:
    """Interrupted and gone on with: the same bits in every process, dropout included."""
    whole = session(DROPPED_OUT, folder / "whole", us)
    try:
        session(DROPPED_OUT, folder / "broken", us, lambda step: fail_at(3, step))
        raise AssertionError("it was to fail")
    except Fault:
        pass
    again = session(DROPPED_OUT, folder / "broken", us)
    assert outcome(again) == outcome(whole)
    assert all(torch.equal(again.adapters[name], tensor) for name, tensor in whole.adapters.items())
    assert len({float(chance) for chance in us.sum([torch.rand(()) * (us.rank == n) for n in (0, 1)])}) == 2


def check_sharding(us: Processes, folder: Path) -> None:
    """Weights in parts: each process holds half of them, and all comes out as with the weights in their files."""
    held = us.hold(torch.arange(10.0).view(5, 2))
    assert held.nbytes == (24, 16)[us.rank]
    with us.uneven():
        for _ in range(2 * us.rank):
            assert held.read().equal(torch.arange(10.0).view(5, 2))
    found = us.by_main(lambda: float(held.read().sum()))
    assert found == 45
    for name, work in SHARDED.items():
        each = [session(work, folder / "offload" / place / name, us, offload=place) for place in ("disk", "shards")]
        assert outcome(each[0]) == outcome(each[1]), name
        assert all(torch.equal(each[0].adapters[key], value) for key, value in each[1].adapters.items())


def on_originals(folder: Path, processes: Processes = ALONE) -> Trained:
    """Begun in 8 bits, ended on the weights as they lie in the checkpoint's files."""
    groups, checkpoint = known_groups("llama-gqa"), folder / "model"
    with processes.main_first():
        if processes.is_main:
            dense("llama-gqa").save_pretrained(checkpoint)
    settings = {"training.quantization": "int8", "training.original_share": 0.6, "pruning.schedule": "one-shot"}
    recipe = load_recipe("loraprune", {**COMMON, **settings, "distillation.weight": 0.5})
    model = load_model(str(checkpoint), quantization="int8")
    attach_lora(model, groups.linears, rank=3, alpha=6, dropout=0.0)
    processes.begin_alike(adapter_parameters(model), recipe.seed)
    return train(
        model, groups, recipe, corpus("loraprune"), Silent(), teacher_folder=folder / "teacher",
        on_cut=lambda event: None, on_validation=lambda history: None, processes=processes,
        originals=Originals(str(checkpoint)),
    )  # fmt: skip


def main(folder: Path) -> None:
    """Do all of it; model and text are those of the command that follows."""
    torch.set_num_threads(1)
    us = join("cpu", wanted=2)
    check_adding(us)
    check_sharding(us, folder)
    model, text = sys.argv[2], sys.argv[sys.argv.index("--data") + 1]
    regrow.prune(model, folder / "parts", "loraprune", data=text, steps=4, offload="shards", overrides=CHANGES)
    check_resuming(us, folder)
    found = {name: outcome(session(work, folder / name, us)) for name, work in WORK.items()}
    found["sensitivity"] = sensitivity(us)
    if find_spec("bitsandbytes"):
        found["originals"] = outcome(on_originals(folder / "originals", us))
    told = us.same(json.loads(json.dumps(found)))
    assert told == found, "the processes differ"
    if us.is_main:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
    runpy.run_module("regrow", run_name="__main__")
