"""The dependency graph of a layer: what is in it, whose it is, and that its picture can be read."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, CommandLine, build, with_lora
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, Olmo2Config

from regrow.errors import InputError
from regrow.report.graph import draw_graph
from regrow.report.layout import place
from regrow.report.picture import to_svg
from regrow.structure.finding import find_groups
from regrow.structure.graph import LayerGraph, layer_graph

SMALL = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "gpt2": lambda: GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32),
    "neox": lambda: GPTNeoXConfig(**SMALL, max_position_embeddings=32),
    "olmo2": lambda: Olmo2Config(**SMALL, num_key_value_heads=2, pad_token_id=0),
}


GRAPHS: dict[str, LayerGraph] = {}


def graph_of(family: str) -> LayerGraph:
    if family not in GRAPHS:
        if family in FAMILIES:
            model = build(family)
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(OTHERS[family]())
        GRAPHS[family] = layer_graph(model, with_lora(model, fill=False), 1)
    return GRAPHS[family]


def arrows(graph: LayerGraph) -> set[tuple[str, str, str]]:
    """(from, to, group's kind), operators that share a title told apart by their order."""
    names, seen = [], {}
    for operator in graph.operators:
        seen[operator.title] = seen.get(operator.title, 0) + 1
        names.append(f"{operator.title} {seen[operator.title]}" if seen[operator.title] > 1 else operator.title)
    return {(names[e.source], names[e.target], (e.group or "").rpartition(".")[2]) for e in graph.edges}


LLAMA = """
hidden states > input_layernorm; hidden states > residual add; input_layernorm > q_proj; input_layernorm > k_proj
input_layernorm > v_proj; q_proj > attention : attention; k_proj > attention : attention
v_proj > attention : attention; attention > o_proj : attention; o_proj > residual add
residual add > post_attention_layernorm; residual add > residual add 2
post_attention_layernorm > gate_proj; post_attention_layernorm > up_proj; gate_proj > act_fn : ffn
act_fn > mul : ffn; up_proj > mul : ffn; mul > down_proj : ffn; down_proj > residual add 2
residual add 2 > hidden states 2
"""


def drawn(text: str) -> set[tuple[str, str, str]]:
    found = set()
    for part in text.replace("\n", ";").split(";"):
        if part.strip():
            link, _, group = part.partition(":")
            source, _, target = link.partition(">")
            found.add((source.strip(), target.strip(), group.strip()))
    return found


def test_llama_by_hand() -> None:
    assert arrows(graph_of("llama-gqa")) == drawn(LLAMA)


def test_qwen3_has_norms_between_projection_and_attention() -> None:
    for x in ("q", "k"):
        assert (f"{x}_proj", f"{x}_norm", "attention") in arrows(graph_of("qwen3"))
        assert (f"{x}_norm", "attention", "attention") in arrows(graph_of("qwen3"))


def test_parallel_branches_meet_in_one_add() -> None:
    links = arrows(graph_of("neox"))
    for source in ("dense", "dense_4h_to_h", "hidden states"):
        assert (source, "residual add", "") in links
    assert not [link for link in links if link[1] == "residual add 2"]


@pytest.mark.parametrize("family", ["llama-gqa", "llama-biases", "qwen3", *OTHERS])
def test_groups_own_what_they_cut(family: str) -> None:
    """Every slice of every group is marked at exactly one weight, and no weight is marked beside."""
    graph = graph_of(family)
    marked = {
        (group, operator.module, weight.role, side)
        for operator in graph.operators
        for weight in operator.weights
        for side, owners in (("rows", weight.rows), ("columns", weight.columns))
        for group in owners
    }
    sliced = set()
    for group in graph.groups:
        for piece in group.slices:
            name = piece.parameter.partition(".1.")[2]
            role = "A" if ".lora_A" in name else "B" if ".lora_B" in name else "bias" if "bias" in name else "W"
            module = piece.module.partition(".1.")[2]
            sliced.add((group.name, module, role, "columns" if piece.is_input else "rows"))
    assert marked == sliced
    assert all(edge.source < edge.target for edge in graph.edges)


def test_a_composed_operator_is_shared_between_its_neighbours() -> None:
    """W and B go with the output's owner, W and A with the input's."""
    by_title = {operator.title: operator for operator in graph_of("llama-gqa").operators}
    for title, mark in (("up_proj", "rows"), ("down_proj", "columns")):
        assert by_title[title].composed
        owned = {weight.role: getattr(weight, mark) for weight in by_title[title].weights}
        factor = "B" if mark == "rows" else "A"
        assert {role for role, owners in owned.items() if owners} == {"W", factor}
        assert owned["W"] == ("layers.1.ffn",)
    assert [weight.shape for weight in by_title["down_proj"].weights] == [(48, 40), (48, 3), (3, 40)]


def test_shapes_are_rows_by_columns_even_where_the_weight_is_stored_turned() -> None:
    attention = next(o for o in graph_of("gpt2").operators if o.title == "c_attn")
    assert {w.role: w.shape for w in attention.weights} == {"W": (96, 32), "B": (96, 3), "A": (3, 32), "bias": (96,)}


def test_without_lora_there_is_nothing_composed() -> None:
    model = build("llama-gqa")
    graph = layer_graph(model, find_groups(model))
    assert arrows(graph) == drawn(LLAMA)
    assert not any(operator.composed or {"A", "B"} & {w.role for w in operator.weights} for operator in graph.operators)


def test_no_such_layer() -> None:
    model = build("llama-gqa")
    with pytest.raises(InputError, match="layers 0 to 1"):
        layer_graph(model, find_groups(model), 2)


# --- the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "gpt2", "neox", "olmo2"])
def test_text_fits_and_nothing_overlaps(family: str) -> None:
    figure = draw_graph(graph_of(family))
    axes = figure.axes[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    page = figure.bbox
    texts = [text.get_window_extent(renderer) for text in axes.texts]
    boxes = {
        tuple(patch.get_window_extent(renderer).extents): patch.get_window_extent(renderer)
        for patch in axes.patches
        if isinstance(patch, FancyBboxPatch)
    }
    assert len(boxes) == len(graph_of(family).operators)
    for number, text in enumerate(texts):
        assert page.containsx(text.x0)
        assert page.containsx(text.x1)
        assert page.containsy(text.y0)
        assert page.containsy(text.y1)
        assert not [other for other in texts[:number] if text.overlaps(other)]
        within = [box for box in boxes.values() if box.overlaps(text)]
        assert all(box.x0 < text.x0 and text.x1 < box.x1 for box in within)
    drawn = list(boxes.values())
    assert not [1 for n, box in enumerate(drawn) for other in drawn[:n] if box.overlaps(other)]


def test_lanes_pass_no_box() -> None:
    links = [(0, 1), (0, 4), (1, 2), (1, 3), (2, 4), (3, 4), (0, 5), (4, 5)]
    boxes, lines = place([(60, 20), (80, 30), (50, 20), (90, 40), (60, 20), (60, 20)], links)
    for line in lines.values():
        if line.lane:
            x, upper, lower = line.lane
            assert upper < lower
            assert not [b for b in boxes if b.left <= x <= b.right and b.top < lower and b.bottom > upper]
    lanes = [line.lane[0] for line in lines.values() if line.lane]
    assert len(lanes) == len(set(lanes)) == 2


def test_the_same_picture_gives_the_same_bytes() -> None:
    graph = graph_of("llama-gqa")
    first = to_svg(draw_graph(graph))
    assert first == to_svg(draw_graph(graph))
    assert ET.fromstring(first).tag.endswith("svg")


def test_inspect_draws(command: CommandLine, checkpoint: Path, tmp_path: Path) -> None:
    for suffix in ("svg", "html"):
        file = tmp_path / f"layer.{suffix}"
        done = command("inspect", checkpoint, "--graph", file, "--layer", "2")
        assert (done.code, done.stderr) == (0, "")
        assert "parameters a unit" in done.stdout
        assert file.read_text().count("</svg>") == 1
    page = (tmp_path / "layer.html").read_text()
    assert "<title>LlamaForCausalLM, decoder layer 2</title>" in page
    assert "<?xml" not in page


@pytest.mark.parametrize(
    ("words", "complaint"),
    [("--graph layer.pdf", ".svg or .html"), ("--graph layer.svg --layer 3", "layers 0 to 2")],
)
def test_what_cannot_be_drawn(
    words: str, complaint: str, command: CommandLine, checkpoint: Path, tmp_path: Path
) -> None:
    done = command("inspect", checkpoint, *words.split(), cwd=tmp_path)
    assert done.code == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
