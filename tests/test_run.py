"""Whole runs, small: every stage leaves what it should, and the same seed gives the same bytes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import regrow
from regrow.planning.plan import Plan
from regrow.recipe import dump_recipe, load_recipe, shipped_recipes


def prune(checkpoint: Path, text: Path, out: Path, recipe: str = "loraprune", steps: int = 8, **settings: object):
    overrides = {**QUICK, **{key.replace("__", "."): value for key, value in settings.items()}}
    return regrow.prune(str(checkpoint), out, recipe, data=str(text), steps=steps, overrides=overrides)


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_every_shipped_recipe_runs(
    recipe: str, checkpoint: Path, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if recipe not in ("flap", "loraprune", "lorashear", "regrow", "shortgpt"):  # saved as these are
        request.getfixturevalue("lean")
    quick = {"search__evaluations": 8} if recipe == "tyr" else {}
    result = prune(checkpoint, text, tmp_path / "out", recipe, **quick)
    out = result.folder
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(result.results))
    assert results["verification"]["passed"]
    layers = "layer" in load_recipe(recipe).pruning.kinds  # whole ones: 2 of 3
    assert 0.5 <= results["sparsity"]["block"] < (0.67 if layers else 0.52)
    assert Plan.parse((out / "plan.json").read_text()) == result.plan
    assert json.loads((out / "run.json").read_text())["state"] == "finished"
    assert load_recipe(str(out / "recipe.yaml")).name == recipe
    report = (out / "report.md").read_text()
    assert f"{results['perplexity']['pruned']['window-32']['value']:.3f}" in report
    uneven = load_recipe(recipe).pruning.shape == "free"
    model = AutoModelForCausalLM.from_pretrained(result.model, trust_remote_code=uneven)
    kept = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(".bias"))  # flap's are beside the plan
    added = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias"))
    assert bool(added) == (recipe == "flap")
    assert kept == results["size"]["pruned"]["total"] - added
    assert kept == result.plan.total_parameters - result.plan.removed_parameters
    assert AutoTokenizer.from_pretrained(result.model).bos_token_id == 0
    assert not list(out.rglob("*.partial")) + list(out.rglob("*.old"))


@pytest.mark.usefixtures("lean")
def test_the_same_seed_gives_the_same_bytes(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    files = []
    for number in range(2):
        result = prune(checkpoint, text, tmp_path / str(number), lora__dropout=0.1)
        files.append({p.name: p.read_bytes() for p in result.model.glob("*.safetensors")})
        files[-1]["plan"] = (result.folder / "plan.json").read_bytes()
    assert files[0] == files[1]
    other = prune(checkpoint, text, tmp_path / "other", seed=1)
    assert {p.name: p.read_bytes() for p in other.model.glob("*.safetensors")}.items() != files[0].items()


def test_the_free_shape_is_saved_and_verified(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = prune(
        checkpoint, text, tmp_path / "out", pruning__shape="free", pruning__allocation="global", pruning__sparsity=0.3
    )
    widths = result.results["widths"]
    assert len({width for name, width in widths.items() if name.endswith("ffn")}) > 1
    assert result.results["verification"]["passed"]
    assert result.results["verification"]["model_class"] == "UnevenForCausalLM"


@pytest.mark.usefixtures("lean")
def test_protected_layers_stay_whole(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = prune(checkpoint, text, tmp_path / "out", pruning__shape="free", pruning__sparsity=0.3)
    assert result.results["widths"]["layers.2.ffn"] == 48  # the recipe protects the last layer
    assert result.results["sparsity"]["block"] >= 0.3


@pytest.mark.usefixtures("lean")
def test_recovery_recovers(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = prune(checkpoint, text, tmp_path / "out", steps=60, training__learning_rate=2e-2)
    quality = {kind: one["window-32"]["value"] for kind, one in result.results["perplexity"].items()}
    assert quality["pruned"] < 0.95 * quality["cut"]
    history = json.loads((result.folder / "history.json").read_text())
    assert history["cuts"][-1]["fraction"] == 1.0
    assert min(v["loss"] for v in history["validations"]) == result.results["training"]["best_validation_loss"]


@pytest.mark.usefixtures("lean")
def test_no_steps_is_a_plain_cut(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = prune(checkpoint, text, tmp_path / "out", "magnitude", steps=0)
    quality = {kind: one["window-32"]["value"] for kind, one in result.results["perplexity"].items()}
    assert quality["pruned"] == pytest.approx(quality["cut"], rel=1e-4)
    dense, pruned = (load_file(folder / "model.safetensors") for folder in (checkpoint, result.model))
    keep = torch.tensor(result.plan.groups["layers.1.ffn"].keep)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(pruned[name], dense[name][keep])


@pytest.mark.usefixtures("lean")
def test_without_steps_there_is_nobody_to_teach(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    few = {"search__evaluations": 4, "search__windows": 4, "search__judge_windows": 2, "compensation__windows": 4}
    result = prune(checkpoint, text, tmp_path / "out", "regrow", steps=0, **few)
    training = result.results["training"]
    assert (training["steps"], training["compensation"]["repaired"] > 0) == (0, True), "refitted all the same"


@pytest.mark.usefixtures("lean")
def test_early_stop(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = prune(
        checkpoint, text, tmp_path / "out", "magnitude", steps=100, training__learning_rate=1.0,
        training__eval_interval=2, training__patience=2,
    )  # fmt: skip
    assert result.results["training"]["steps"] < 100


@pytest.mark.usefixtures("lean")
def test_an_earlier_run_is_done_afresh(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for sparsity in (0.2, 0.5):
        settings = {**QUICK, "pruning.sparsity": sparsity}
        result = regrow.prune(
            str(checkpoint), tmp_path / "out", "magnitude", data=str(text), steps=1, overrides=settings, fresh=True
        )
    assert result.results["sparsity"]["block"] >= 0.5
    assert AutoModelForCausalLM.from_pretrained(result.model).config.intermediate_size < 30


@pytest.mark.usefixtures("lean")
def test_a_recipe_may_be_an_object(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    recipe = load_recipe("magnitude", QUICK)
    result = regrow.prune(checkpoint, tmp_path / "out", recipe, data=str(text), steps=2, sparsity=0.25)
    assert result.results["sparsity"]["requested"] == 0.25
    assert "sparsity: 0.25" in (result.folder / "recipe.yaml").read_text()
    assert dump_recipe(recipe) != (result.folder / "recipe.yaml").read_text()


def test_real_llama(real_data: Path, tmp_path: Path) -> None:
    """A pretrained model: pruning hurts, recovery helps, and the dense figure is the known one."""
    stories = real_data / "text" / "tinystories"
    result = regrow.prune(
        str(real_data / "models" / "stories260K"),
        tmp_path / "out",
        "loraprune",
        data=str(stories / "train.jsonl"),
        eval_data=str(stories / "valid.jsonl"),
        sparsity=0.2,
        steps=40,
        overrides={"evaluation.speed": False, "evaluation.memory": False, "evaluation.max_windows": 150},
    )
    quality = {kind: one["window-256"]["value"] for kind, one in result.results["perplexity"].items()}
    assert quality["dense"] == pytest.approx(4.6, rel=0.05)
    assert quality["dense"] < quality["pruned"] < quality["cut"]
    assert result.results["sparsity"]["block"] == pytest.approx(0.2, abs=0.004)
