"""Whatever is read from files is a valid object or one `InputError`: mutations of valid documents, and properties."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from regrow.checkpoint.peft_folder import CONFIG_FILE, WEIGHTS_FILE, Adapter
from regrow.checkpoint.stream import SCALING, check_plan, open_adapters
from regrow.checkpoint.tensors import weight_files
from regrow.errors import InputError
from regrow.evaluation.latency import Latency, Saving
from regrow.planning.allocation import choose
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Conditions, GroupSensitivity, Sensitivity
from regrow.recipe import Recipe, dump_recipe, load_recipe, parse_assignments, parse_recipe, shipped_recipes
from regrow.settings import Pruning
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups

bounded = settings(
    max_examples=150, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

DEEP: Any = 1
for _ in range(150):
    DEEP = [DEEP]

ODD_VALUES = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 10**400, 0.5, -0.0, 1e308, 5e-324, math.nan,
        math.inf, -math.inf, "", "0", "-1", "1e5", "nan", "é", "a\u0000b", "a\nb", "\x1b[31m", "\u202e", "x" * 5000,
        "../../etc/passwd", "${HOME}", [], {}, [[]], [None], [-1], [0, 0], [1, 0], {"": 1}, {"a": {"b": [1]}}, DEEP,
    ]
)  # fmt: skip


@st.composite
def mutated(draw: Callable[..., Any], document: Any, times: int = 2) -> Any:
    """A document with a few things in it dropped, doubled, renamed, swapped or put in another's place."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, times))):
        place, key = document, None
        while isinstance(place, dict | list) and place and (key is None or draw(st.integers(0, 3))):
            parent, key = (
                place,
                draw(st.sampled_from(sorted(place, key=str) if isinstance(place, dict) else range(len(place)))),
            )
            place = parent[key]
        if key is None:
            return draw(ODD_VALUES)
        match draw(st.sampled_from(["drop", "odd", "odd", "negate", "double", "rename"])):
            case "drop":
                del parent[key]
            case "odd":
                parent[key] = copy.deepcopy(draw(ODD_VALUES))
            case "negate" if isinstance(place, int | float):
                parent[key] = -place - 1
            case "double" if isinstance(parent, list):
                parent.append(place)
            case "rename" if isinstance(parent, dict):
                parent[
                    draw(st.sampled_from(["", "0", "layers", "layers.x.ffn", "layers.0.", "layers.99.ffn", "né"]))
                ] = place
            case _:
                parent[key] = [place, place]
    return document


def tried(read: Callable[[], Any]) -> Any:
    """What is read, or None if it is refused as it should be: in a message that can be printed."""
    try:
        return read()
    except InputError as error:
        message = str(error)
    assert message.strip()
    message.encode()
    return None


# --- plans --------------------------------------------------------------------------------------


def tiny(hidden: int = 16, heads: int = 4, kv: int = 2, width: int = 12, layers: int = 2) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 4}
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**shape, intermediate_size=width, num_hidden_layers=layers, vocab_size=32)
    )


MODEL = tiny()
WHOLE = find_groups(MODEL)
PLAN = Plan.whole(WHOLE).keeping({"layers.0.ffn": range(3, 12), "layers.1.attention": [1]}).to_json()


@bounded
@given(mutated(PLAN))
def test_plans(document: Any) -> None:
    plan = tried(lambda: Plan.parse(json.dumps(document)))
    if plan is None:
        return
    for group in plan.parts.values():
        assert list(group.keep) == sorted(set(group.keep))
        assert not group.keep or 0 <= group.keep[0] <= group.keep[-1] < group.units
    assert 0 <= plan.sparsity.block <= 1
    assert 0 <= plan.sparsity.total < 1
    assert 0 <= plan.sparsity.units <= 1
    assert Plan.parse(json.dumps(plan.to_json())) == plan
    if tried(lambda: check_plan(plan, WHOLE, "tiny") or True):  # then it can be carried out
        keep = plan.positions_within(Plan.whole(WHOLE))
        assert all(
            0 <= p.min() <= p.max() < WHOLE.by_name(name).units
            for name, p in keep.items()
            if len(p) and name != "residual"
        )


@pytest.mark.parametrize("keep", [[0, 0], [1, 0], [-1], [True], [0.0], ["0"], [12], [2**70], [[0]], {"0": 1}])
def test_units_of_a_plan_are_numbers_named_once_in_order(keep: Any) -> None:
    document = copy.deepcopy(PLAN)
    document["groups"]["layers.0.ffn"]["keep"] = keep
    with pytest.raises(InputError, match=r"not a valid plan: groups\.layers\.0\.ffn"):
        Plan.parse(json.dumps(document))


# --- recipes ------------------------------------------------------------------------------------

TREE = load_recipe("regrow").model_dump(mode="json")


@bounded
@given(mutated(TREE, times=3))
def test_recipes_as_trees(tree: Any) -> None:
    recipe = tried(lambda: parse_recipe(tree) if isinstance(tree, dict) else None)
    if recipe is not None:
        assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
        dump_recipe(recipe).encode()


LAUGHS = "a: &a [l, l, l, l, l, l, l, l, l]\n" + "".join(
    f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = [
    LAUGHS, LAUGHS + "evaluation: {prompts: *i}\n", "description: &a [*a]", "name: &a {name: *a}", "? [1]\n: 2",
    "seed: 2001-99-99", "seed: !!timestamp x", "seed: !!int x", "seed: !!float x", "seed: !!bool x", "seed: 0x_",
    "seed: " + "9" * 5000, "seed: 1e999", "seed: .nan", "seed: 190:20:30", "name: !!binary zzz", "name: !!python/none",
    "name: !!set {a, b}", "name: !<tag:x> y", "name: \"\\ud800\"", "name: \"\\0\"", "data: {source: \"a\\0b\"}", 
    "\x00", "\x1b",
    "%YAML 9.9\n---\nseed: 1", "---\nseed: 1\n---\nseed: 2", "<<: 1", "<<: [{seed: 1}, 2]", "lora: {<<: {rank: 3}}",
    "[" * 500, "{a: " * 500, "&a a: *b", "seed: *nobody", "- 1", "1", "''", "[]", "false", "~", "\t", "seed:\n\t- 1",
    "@",
    "seed: 1\nseed: 2", "lora: {rank: 99999999999999999999}", "training: {clip: 1e-400}", 
    "pruning: {kinds: [ffn, ffn]}",
    "data: {sources: [{name: a, source: b}, {name: a, source: c}]}", "1: 2", "null: 1",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(text.encode())
    recipe = tried(lambda: load_recipe(str(tmp_path / "my.yaml")))
    if recipe is not None:
        assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    for path in ("seed", "data.source", "evaluation.prompts", ""):
        settings_ = tried(lambda path=path: parse_assignments([f"{path}={text}"]))
        if settings_ is not None:
            tried(lambda changed=settings_: load_recipe("regrow", changed))


PIECES = st.sampled_from(
    [*"&*!%@`[]{},:#|>?-\"' \n\t~<=.0x9e", "!!", "---", "a: ", "- ", "lora", "seed", "rank", "\u2028", "\x85"]
)
KEYS = st.sampled_from(
    ["seed", "lora.rank", "lora", "pruning.sparsity", "data.sources", "a.b", ".", "lora..rank", "seed.x", "é"]
)


@bounded
@given(st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=20), KEYS)
def test_recipes_and_assignments_as_text(text: str, key: str) -> None:
    settings_ = tried(lambda: parse_assignments([f"{key}={text}"]))
    if settings_ is not None:
        recipe = tried(lambda: load_recipe("magnitude", settings_))
        if recipe is not None:
            assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def valid_changes() -> st.SearchStrategy[dict[str, Any]]:
    """Values that a recipe may have, of every kind of field."""
    share = st.floats(0, 1, exclude_max=True)
    return st.fixed_dictionaries(
        {},
        optional={
            "name": st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
            "description": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
            "seed": st.integers(0, 2**32 - 1),
            "pruning.sparsity": st.floats(0, 1, exclude_min=True, exclude_max=True),
            "pruning.kinds": st.lists(st.sampled_from(["attention", "ffn", "layer"]), min_size=1, unique=True),
            "pruning.floor": share,
            "pruning.ema": st.none() | share,
            "training.clip": st.floats(0, 1e300, exclude_min=True),
            "training.learning_rate": st.none() | st.floats(1e-300, 1e300),
            "evaluation.prompts": st.lists(
                st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9), max_size=3
            ),
            "evaluation.windows": st.lists(st.integers(2, 10**6), min_size=1, max_size=3),
            "compensation.blend": st.lists(st.floats(0.001, 1), min_size=1, max_size=3),
            "lora.targets": st.lists(st.sampled_from(["q_proj", "no", "1", "null"]), max_size=2),
        },
    )


@bounded
@given(st.sampled_from(sorted(shipped_recipes())), valid_changes())
def test_every_valid_recipe_survives_yaml(name: str, changes: dict[str, Any]) -> None:
    recipe = load_recipe(name, changes)
    assert isinstance(recipe, Recipe)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert recipe.override({}) == recipe


# --- what is measured once and read again -------------------------------------------------------

CONDITIONS = Conditions(
    model_sha256="m", dtype="float32", tokens_sha256="t", windows=2, length=8, calibration_sha256="c",
    calibration_batches=1, batch_size=2, seed=0, criterion="gate-fisher", scoring_sha256="s",
    shares=(0.25, 0.5),
)  # fmt: skip
SENSITIVITY = Sensitivity(
    conditions=CONDITIONS,
    dense_nll=2.0,
    groups={
        f"layers.{n}.{kind}": GroupSensitivity(units=8, cost=5, removed=(2, 4), deltas=(0.1 * n, 0.3))
        for n in range(3)
        for kind in ("attention", "ffn")
    },
    together={"ffn": GroupSensitivity(units=24, cost=5, removed=(6, 12), deltas=(0.2, 0.4))},
).to_json()


@bounded
@given(mutated(SENSITIVITY))
def test_sensitivities(document: Any) -> None:
    found = tried(lambda: Sensitivity.parse(json.dumps(document)))
    if found is not None:
        prior = found.prior(0.3)
        curves = [*prior.curves.values(), *prior.together.values()]
        assert all(math.isfinite(curve(0.5)) and curve(0.5) >= 0 for curve in curves)
        assert Sensitivity.parse(json.dumps(found.to_json())) == found


SECONDS = {"prefill": 0.5, "decode": 0.25}
LATENCY = Latency(
    {"cpu": "x", "threads": 1}, SECONDS, SECONDS,  # type: ignore[arg-type]
    {kind: (Saving(1, SECONDS), Saving(4, {"prefill": 0.0, "decode": 0.0})) for kind in ("attention", "ffn")},  # type: ignore[arg-type]
).to_json()  # fmt: skip


@bounded
@given(mutated(LATENCY))
def test_latency_tables(document: Any) -> None:
    found = tried(lambda: Latency.parse(json.dumps(document), {"attention", "ffn"}))
    if found is not None:
        for phase in ("prefill", "decode"):
            seconds = found.seconds(phase, {"layers.0.attention": 2, "layers.0.ffn": 3})  # type: ignore[arg-type]
            assert 0 <= seconds < math.inf
        assert Latency.parse(json.dumps(found.to_json()), ()) == found


# --- files of tensors ---------------------------------------------------------------------------

INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@bounded
@given(
    document=mutated(INDEX)
    | st.sampled_from(["..", "a/b.safetensors", "\0.safetensors", "\\x.safetensors", "~.safetensors"])
)
def test_safetensors_indices(document: Any, tmp_path: Path) -> None:
    if isinstance(document, str):
        document = {"weight_map": {"a": document}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(document))
    for file in tried(lambda: weight_files(tmp_path)) or []:
        assert file.parent == tmp_path
        assert file.suffix == ".safetensors"
        assert not file.exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "9" * 5000, '{"weight_map": {}}', '{"weight_map": {"a": "\\ud800.safetensors"}}']
)
def test_hostile_indices(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json"):
        weight_files(tmp_path)


ADAPTER = {
    **LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict(),  # type: ignore[arg-type]
    "target_modules": ["q_proj"],
}


def write_adapter(folder: Path, config: Any, **factors: tuple[int, ...]) -> Path:
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({key.format(name): torch.ones(shape) for name, shape in factors.items()}, folder / WEIGHTS_FILE)
    return folder


@bounded
@given(config=mutated(ADAPTER))
def test_adapter_configs(config: Any, tmp_path: Path) -> None:
    found = tried(lambda: Adapter.read(write_adapter(tmp_path, config, A=(2, 16), B=(16, 2))))
    assert found is None or found.config["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "shapes", [{"A": (2, 16)}, {"B": (16, 2)}, {"A": (2, 16), "B": (16, 3)}, {"A": (2,), "B": (16, 2)}]
)
def test_factors_come_in_pairs(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no two factors of the same rank"):
        Adapter.read(write_adapter(tmp_path, ADAPTER, **shapes))
    tensors = {f"model.layers.0.self_attn.q_proj.lora_{f}.default.weight": torch.ones(s) for f, s in shapes.items()}
    save_file(tensors, tmp_path / "adapters.safetensors", {SCALING: "2.0"})
    with pytest.raises(InputError, match="no counterpart of the same rank"):
        open_adapters(tmp_path / "adapters.safetensors")


@pytest.mark.parametrize("scale", ["", "nan", "inf", "two", "1e999"])
def test_a_scale_is_a_number(scale: str, tmp_path: Path) -> None:
    tensors = {f"q_proj.lora_{f}.default.weight": torch.ones(2, 2) for f in "AB"}
    save_file(tensors, tmp_path / "adapters.safetensors", {SCALING: scale})
    with pytest.raises(InputError, match="does not say how its factors are scaled"):
        open_adapters(tmp_path / "adapters.safetensors")


# --- any shape ----------------------------------------------------------------------------------


@settings(max_examples=6, derandomize=True, database=None)
@given(
    kv=st.integers(1, 3), queries=st.integers(1, 3), width=st.integers(3, 30), layers=st.integers(1, 3),
    sparsity=st.floats(0.05, 0.6), shape=st.sampled_from(["free", "uniform"]), equal=st.booleans(),
    allocation=st.sampled_from(["local", "global", "by-kind", "pooled", "log-increasing"]),
)  # fmt: skip
def test_plans_of_any_shape_survive_json_and_are_carried_out(
    kv: int, queries: int, width: int, layers: int, sparsity: float, shape: str, equal: bool, allocation: str
) -> None:
    model = tiny(36, kv * queries, kv, width, layers)
    groups = find_groups(model)
    chance = torch.Generator().manual_seed(width)
    scores = {g.name: torch.ones(g.units) if equal else torch.rand(g.units, generator=chance) for g in groups}
    pruning = Pruning(sparsity=sparsity, shape=shape, allocation=allocation, protect_last=0)  # type: ignore[arg-type]
    plan = tried(lambda: choose(groups, Plan.whole(groups), scores, pruning))
    if plan is None:
        return
    channel = groups.by_name("layers.0.ffn").cost * (layers if shape == "uniform" else 1)
    surplus = plan.removed_parameters - sparsity * groups.block_parameters
    assert -1e-6 <= surplus < channel
    read = Plan.parse(json.dumps(plan.to_json()))
    assert read == plan
    check_plan(read, groups, "it")
    before = sum(parameter.numel() for parameter in model.parameters())
    left = cut(model, groups, read.positions_within(Plan.whole(groups)))
    assert {g.name: g.units for g in left} == {name: len(g.keep) for name, g in plan.groups.items()}
    assert before - sum(parameter.numel() for parameter in model.parameters()) == plan.removed_parameters
    assert torch.isfinite(model(input_ids=torch.arange(8)[None], use_cache=False).logits).all()
