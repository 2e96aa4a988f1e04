"""The reports: made again from files alone, true to them, accessible, safe, and honest."""

import copy
import dataclasses
import json
import math
import mmap
import re
import struct
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARGV, LONG_NAME, QUICK, CommandLine
from huggingface_hub import ModelCard
from rich.console import Console

from regrow.checkpoint.licence import licence_of
from regrow.comparison.pictures import loss_over_runs
from regrow.comparison.table import Row
from regrow.errors import InputError
from regrow.evaluation.machine import memory_in_use
from regrow.recipe import load_recipe
from regrow.recovery.learner import Learner
from regrow.recovery.mixing import DataMix
from regrow.recovery.tracking import check_tracker, tracking
from regrow.report.card import model_card
from regrow.report.cautions import cautions
from regrow.report.facts import Facts, read_facts
from regrow.report.figures import Scored, quality_charts, score_charts, smoothed, thinned, thresholds
from regrow.report.markdown import write_report
from regrow.report.page import write_page
from regrow.report.svg import Axis, across, upward
from regrow.report.terminal import show
from regrow.reuse import report
from regrow.run import prune
from regrow.terminal import NotedBars, TerminalProgress

VOID = {"meta", "link", "br", "circle", "line", "polyline", "rect"}


@pytest.fixture(scope="module")
def facts(reported_run: Path) -> Facts:
    return read_facts(reported_run)


class Page(HTMLParser):
    """Elements of a page, checked for balance as they come."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.children: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.children.append((self.open[-1] if self.open else "", tag))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, *tags: str) -> Iterator[tuple[str, dict[str, str | None]]]:
        return ((tag, attributes) for tag, attributes in self.elements if tag in tags)


# --- from files alone ----------------------------------------------------------------------------


def test_both_reports_can_be_made_again_to_the_byte(reported_run: Path, command: CommandLine) -> None:
    files = [reported_run / "report.md", reported_run / "report.html"]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    done = command("report", reported_run)
    assert done.code == 0
    assert done.stdout.split() == [str(file) for file in files]
    assert [file.read_bytes() for file in files] == before


def test_a_folder_without_a_finished_run_is_refused_in_one_line(reported_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        read_facts(tmp_path)
    for file in reported_run.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, reason in (("history.json", "not valid JSON"), ("scores.safetensors", "cannot be read")):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-9])
        with pytest.raises(InputError, match=f"{name}.*{reason}"):
            read_facts(tmp_path)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "history.json").unlink()
    with pytest.raises(InputError, match="the report needs what the run left"):
        read_facts(tmp_path)


# --- what was not finite -------------------------------------------------------------------------


def strictly(file: Path) -> Any:
    """What is in a file that is JSON, and not merely what Python takes for it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.mark.usefixtures("lean")
def test_a_skipped_step_is_null_in_the_files(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, validation_loss = Learner.backward, DataMix.validation_loss
    bad_step = lambda learner, *args: math.nan if learner.step_number == 1 else backward(learner, *args)  # noqa: E731
    bad_loss = lambda mix, step: math.inf if step == 2 else validation_loss(mix, step)  # noqa: E731
    monkeypatch.setattr(Learner, "backward", bad_step)
    monkeypatch.setattr(DataMix, "validation_loss", bad_loss)
    again = partial(
        prune, str(checkpoint), tmp_path / "out", "magnitude", data=str(text), steps=6,
        overrides={**QUICK, "training.eval_interval": 2},
    )  # fmt: skip
    result = again()
    history = strictly(result.folder / "history.json")
    assert [one["step"] for one in history["steps"] if one["loss"] is None] == [1]
    assert [one["step"] for one in history["validations"] if one["loss"] is None] == [2]
    assert strictly(result.folder / "results.json")["training"]["skipped_updates"] == 1
    files = result.folder / "report.md", result.folder / "report.html"
    assert "| 2 | not finite |" in files[0].read_text()
    assert files[1].read_text().count(">not finite<") == 1
    assert "Loss and sparsity" in files[1].read_text()
    before = [file.read_bytes() for file in files]
    assert report(result.folder) == files
    assert [file.read_bytes() for file in files] == before
    (result.folder / "results.json").unlink()
    (result.model / "model.safetensors").unlink()
    assert again().results["training"] == result.results["training"]  # from what the training has left
    row = Row("magnitude", 0.5, [{**result.results, "history": history}])
    (line,) = loss_over_runs([row]).axes[0].lines
    assert np.isnan(line.get_ydata(orig=False)).tolist() == [one["loss"] is None for one in history["validations"]]


def test_rounds_in_which_a_loss_was_not_finite(facts: Facts) -> None:
    results = copy.deepcopy(facts.results)
    results["training"]["search"] = {"candidates": [{"layers": 3}], "divergence": [None], "best": 0.5}
    rounds = results["training"]["mixture"]["rounds"]
    rounds[-1] |= {"losses": dict.fromkeys(rounds[-1]["losses"]), "degradation": dict.fromkeys(rounds[-1]["losses"])}
    changed = dataclasses.replace(facts, results=results)
    text, page = write_report(changed), write_page(changed)
    assert text.count(", not finite (not finite)") == 2
    assert "| 3 |  |  | not finite |" in text
    assert "at the end: tales not finite; " in page
    results["training"]["search"] = {"starts": 1, "trace": [None, 0.5], "best": 0.5}
    assert "from not finite to divergence 0.500" in write_report(changed)


def test_the_command_is_kept_or_python_says_how(reported_run: Path, facts: Facts) -> None:
    assert json.loads((reported_run / "run.json").read_text())["argv"] == ARGV
    assert facts.command == "regrow prune tiny --recipe lorashear --out 'my run'"
    for made in (write_report(facts), write_page(facts).replace("&#39;", "'")):
        assert facts.command in made
        assert facts.recipe_sha256 in made


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_accessible(facts: Facts) -> None:
    page = Page(write_page(facts))
    levels = [int(tag[1]) for tag, _ in page.named("h1", "h2", "h3")]
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    tables = sum(1 for _ in page.named("table"))
    assert page.children.count(("table", "caption")) == tables > 5
    assert all(attributes["scope"] in ("row", "col") for _, attributes in page.named("th"))
    for _, attributes in page.named("svg"):
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 20
    assert page.children.count(("svg", "title")) == sum(1 for _ in page.named("svg")) >= 8
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] or "" for _, attributes in page.named("a")]
    assert [link[1:] for link in links] == [name for name in ids if not (name or "").endswith("-head")]
    assert links[1:6] == ["#widths", "#sensitivity", "#scores", "#training", "#data"]


def test_the_page_asks_nothing_of_the_network(facts: Facts) -> None:
    text = write_page(facts)
    page = Page(text)
    assert not list(page.named("script", "img", "iframe", "object"))
    assert [attributes["href"] for _, attributes in page.named("link")] == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text
    policy = next(a["content"] for _, a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_what_models_write_and_sources_are_called_is_text(facts: Facts) -> None:
    results = copy.deepcopy(facts.results)
    results["completions"][0]["pruned"] = "</p><script>alert(1)</script>"
    results["model"] = "me/<i>tiny"
    page = Page(write_page(dataclasses.replace(facts, results=results)))
    assert not list(page.named("script", "b"))
    words = "".join(page.words)
    assert "</p><script>alert(1)</script>" in words
    assert "me/<i>tiny, pruned with lorashear" in words
    assert LONG_NAME in words


def test_the_screen_shows_brackets_as_they_are(facts: Facts) -> None:
    results, screen = copy.deepcopy(facts.results), StringIO()
    results["completions"][0] |= {"prompt": "[bold]a [/quote] b", "pruned": "[i]c[/i]"}
    results["model"] = "me/tiny[v2]"
    show(results, Path("run"), Console(file=screen, width=200))
    for shown in ("prompt [bold]a [/quote] b\n", "pruned [i]c[/i]\n", "me/tiny[v2] ·"):
        assert shown in screen.getvalue()


def test_the_figures_are_those_of_the_run(facts: Facts) -> None:
    words = "".join(Page(write_page(facts)).words)
    results = facts.results
    dense, cut, pruned = (results["perplexity"][kind]["window-32"]["value"] for kind in ("dense", "cut", "pruned"))
    assert all(f"{value:.3f}" in words for value in (dense, cut, pruned))
    smaller = 1 - results["size"]["pruned"]["total"] / results["size"]["dense"]["total"]
    assert f"−{smaller:.0%}" in words
    assert f"{results['speedup'][0]['decode']:.2f} ×" in words
    for name, group in facts.plan.groups.items():
        assert f"{len(group.keep)} of {group.units}" in words
        assert facts.sensitivity
        assert f"{facts.sensitivity.groups[name].mean:.4f}" in words
    assert [item["prompt"] for item in results["completions"]] == ["Once upon a time", "W" * 120]
    assert all(caution in words for caution in cautions(results))
    total = results["seconds"]["total"]
    assert all(
        f"{value:.1f} s, {100 * value / total:.0f} %" in words
        for stage, value in results["seconds"].items()
        if stage != "total"
    )


def test_where_the_time_went_is_told_part_by_part(facts: Facts) -> None:
    seconds = dict(facts.results["seconds"])
    assert {"read text", "train", "score", "plan", "cut", "validate", "checkpoint", "evaluate"} <= set(seconds)
    assert min(seconds.values()) >= 0
    total = seconds.pop("total")
    assert total == pytest.approx(sum(seconds.values()), abs=1e-3 * len(seconds))
    text = write_report(facts)
    assert all(f"| {stage} | {value:.1f} | {value / total:.1%} |" in text for stage, value in seconds.items())


def test_a_run_with_little_to_show_has_a_page_too(facts: Facts) -> None:
    results = copy.deepcopy(facts.results)
    for key in ("speed", "speedup"):
        del results[key]
    del results["training"]["mixture"]
    results["completions"] = []
    history = {
        "steps": [],
        "validations": [{"step": 0, "loss": 5.0}],
        "cuts": facts.history["cuts"][-1:],
        "mixture": [],
    }
    scores = {name: np.zeros(len(values)) for name, values in facts.scores.items()}  # criterion random has none better
    bare = dataclasses.replace(facts, results=results, history=history, scores=scores, sensitivity=None)
    page = Page(write_page(bare))
    links = [attributes["href"] for _, attributes in page.named("a")]
    assert links == ["#summary", "#widths", "#quality", "#reproduce"]
    assert sum(1 for _ in page.named("svg")) == 1
    assert "not measured" in "".join(page.words)
    assert "Side by side" not in write_report(bare)
    results["perplexity"]["cut"]["window-32"]["value"] = math.inf  # so bad that the exponential overflows
    results["sparsity"]["block"] = history["cuts"][0]["block"] = 0.0
    assert "inf" not in str(next(quality_charts(results)).svg)
    assert write_page(bare)


# --- charts ---------------------------------------------------------------------------------------


def test_axes_place_values_and_label_round_ones() -> None:
    axis = Axis(0, 10, 50, 150)
    assert (axis.at(0), axis.at(2.5), axis.at(10)) == (50, 75, 150)
    assert axis.ticks() == [(0, "0"), (2, "2"), (4, "4"), (6, "6"), (8, "8"), (10, "10")]
    log = Axis(1, 10_000, 0, 4, log=True)
    assert [log.at(10**n) for n in range(5)] == pytest.approx([0, 1, 2, 3, 4])
    assert [label for _, label in log.ticks()] == ["1", "10", "100", "1000", "10k"]
    assert upward([3, 3]).low < 3 < upward([3, 3]).high  # one value alone has room
    assert [label for _, label in across([0, 0.5], percent=True).ticks()] == ["0%", "10%", "20%", "30%", "40%", "50%"]
    assert [label for _, label in upward([0, 2], whole=True, pad=0).ticks()] == ["0", "1", "2"]


def test_long_curves_are_averaged_not_picked() -> None:
    points = [(float(n), float(n % 2)) for n in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert all(value == 0.5 for _, value in few)
    assert thinned(points[:5], 100) == points[:5]
    values = [float(n * n % 7) for n in range(80)]  # a reach of two on each side
    found = smoothed(list(enumerate(values)))
    assert found[10] == (10, pytest.approx(np.mean(values[8:13])))
    assert found[0][1] == pytest.approx(np.mean(values[:3]))


def test_thresholds_lie_between_what_went_and_what_stayed() -> None:
    def scored(values: list[float], kept: list[int]) -> Scored:
        return np.array(values), np.isin(np.arange(len(values)), kept)

    groups = {
        "layers.0.ffn": scored([1.0, 4.0, 2.0], [1]),  # 1 and 2 went, 4 stayed
        "layers.1.ffn": scored([1.0, 5.0], [0, 1]),
        "layers.2.ffn": scored([3.0, 1.0], [1]),  # the higher one went
    }
    assert thresholds(groups) == ([3.0], 1)


def test_the_histogram_shows_every_unit(facts: Facts) -> None:
    charts = {chart.name: chart for chart in score_charts(facts.scores, facts.plan)}
    assert list(charts) == ["Scores of KV heads, each with its query heads", "Scores of FFN channels"]
    svg = str(charts["Scores of FFN channels"].svg)
    heights = {css: 0.0 for css in ("c0", "c1")}
    for height, css in re.findall(r'height="([\d.]+)" class="bar (c\d)"', svg):
        heights[css] += float(height)
    groups = [group for name, group in facts.plan.groups.items() if name.endswith("ffn")]
    kept, units = sum(len(group.keep) for group in groups), sum(group.units for group in groups)
    assert heights["c0"] / heights["c1"] == pytest.approx(kept / (units - kept), rel=0.02)
    assert f"{units - kept} of {units} removed" in charts["Scores of FFN channels"].caption


def test_trials_have_their_own_chart(facts: Facts) -> None:
    results = copy.deepcopy(facts.results)
    trials = [{"sparsity": s, "dense": 4.0, "recovered": r, "holds": r < 5} for s, r in ((0.2, 4.4), (0.4, 6.0))]
    results["target"] = {"kind": "perplexity", "limit": 5.0, "trials": trials}
    assert [chart.name for chart in quality_charts(results)] == [
        "Quality against size",
        "Quality against speed of writing",
        "Quality against speed of reading",
        "Trials for the target",
    ]


# --- honesty --------------------------------------------------------------------------------------


def test_cautions_say_what_holds_and_nothing_else(facts: Facts) -> None:
    results = copy.deepcopy(facts.results)
    tell = lambda: " ".join(cautions(results))  # noqa: E731
    assert "held out of the text that it was trained on" in tell()
    assert "tokens only" in tell()
    assert "fixed costs weigh most" in tell()
    results["own_text"] = {"evaluated_on_it": True}
    assert "text that it wrote itself" in tell()
    for kind, value in (("dense", 5.0), ("cut", 9.0), ("pruned", 10.0)):
        measured = results["perplexity"][kind]["window-32"]
        measured |= {"value": value, "nll": math.log(value), "tokens": 10**6, "source": "wikitext"}
    assert "2.0 times as high" in tell()
    assert "Training made it worse" in tell()
    assert "tokens only" not in tell()
    results["training"] |= {"best_step": 12, "steps": 12, "skipped_updates": 3}
    assert "still falling" in tell()
    assert "3 updates were skipped" in tell()
    results["overlap"]["share"] = 0.3
    assert "30% of the evaluated text's" in tell()
    fine = copy.deepcopy(results)
    fine["overlap"]["share"] = 0.0
    del fine["own_text"]
    fine["size"]["dense"]["total"] = 10**9
    fine["training"] |= {"best_step": 8, "skipped_updates": 0}
    fine["verification"]["model_class"] = "LlamaForCausalLM"
    for kind in ("cut", "pruned"):
        fine["perplexity"][kind]["window-32"]["value"] = 5.5
    rates = {"median": 1.0, "low": 0.9, "high": 1.1}
    fine["speed"]["dense"][0] |= {"prefill": rates, "decode": rates}
    twice = {key: 2 * value for key, value in rates.items()}
    fine["speed"]["pruned"][0] |= {"prefill": twice, "decode": twice, "device": "cuda:0"}
    assert len(cautions(fine)) == 1  # only that perplexity alone was measured
    fine["speed"]["pruned"][0]["decode"] = rates
    fine["tasks"] = {"dense": {}}
    assert "Only perplexity and the tasks above were measured" in " ".join(cautions(fine))
    assert "about as fast: decode at batch 1" in " ".join(cautions(fine))


def test_the_model_card_is_one_the_hub_can_read(reported_run: Path, facts: Facts) -> None:
    card = ModelCard((reported_run / "model" / "README.md").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["regrow", "pruned", "lora"]
    assert card.data.license == "mit"
    assert card.data.license_link is None  # it led to a file beside the original
    assert card.data.base_model is None  # a folder here is nothing that the hub knows
    for part in ("## Before and after", "## How it was made", "## Limits", *cautions(facts.results)):
        assert part in card.text
    named = ModelCard(model_card("owner/name", facts.recipe, facts.plan, {"license": "other"}, facts.results))
    assert named.data.base_model == "owner/name"
    assert named.data.license == "other"
    plain = model_card("owner/name", None, facts.plan, {})
    assert "license" not in plain
    assert "LoRA" not in plain


def test_a_licence_is_what_the_card_says_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert licence_of(str(tmp_path)) == {}
    for text in ("no metadata", "---\nlicense: [\n---\n", "---\nlicense: 3\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(str(tmp_path)) == {}
    link = "https://example.org/licence"
    (tmp_path / "README.md").write_text(f"---\nlicense: other\nlicense_name: mine\nlicense_link: {link}\n---\n")
    assert licence_of(str(tmp_path)) == {"license": "other", "license_name": "mine", "license_link": link}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert licence_of("nobody/has-this") == {}


# --- while it runs --------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, from TensorBoard's event files."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for file in folder.glob("events*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            data = data[16 + length :]
    return found


def test_tensorboard_has_what_the_history_has(reported_run: Path, facts: Facts) -> None:
    found, history = scalars(reported_run / "tracker"), facts.history
    assert found["loss"] == pytest.approx({one["step"]: one["loss"] for one in history["steps"]}, rel=1e-6)
    losses = {one["step"]: one["loss"] for one in history["validations"]}
    assert found["validation_loss"] == pytest.approx(losses, rel=1e-6)
    weights = {one["step"]: one["weights"]["tales"] for one in history["mixture"]}
    assert found["data_weight/tales"] == pytest.approx(weights, rel=1e-6)
    assert found["sparsity"][max(found["sparsity"])] == pytest.approx(facts.results["sparsity"]["block"], rel=1e-6)
    assert found["learning_rate"][11] < max(found["learning_rate"].values())
    assert min(found["tokens_per_second"].values()) > 0


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_the_recipe_and_the_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is not there; its place is taken by what accelerate calls of it."""
    logged: list[tuple[dict[str, float], int]] = []
    config: dict[str, object] = {}
    asked: dict[str, object] = {}
    ended: list[bool] = []
    session = SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: ended.append(True))
    package = SimpleNamespace(
        init=lambda **given: asked.update(given) or session,
        config=SimpleNamespace(update=lambda values, allow_val_change: config.update(values)),
    )
    monkeypatch.setitem(sys.modules, name, package)
    with tracking(load_recipe("loraprune", {"output.tracker": name}), tmp_path / "my-run") as track:
        track({"loss": 2.5}, 7)
    assert asked["project"] == "regrow"
    assert asked["name"] == "my-run"
    assert config["pruning.criterion"] == "lora"
    assert config["evaluation.windows"] == "[256]"
    assert logged == [({"loss": 2.5}, 7)]
    assert ended


def test_a_tracker_that_is_not_there_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.recovery.tracking.find_spec", lambda name: None)
    check_tracker("none")
    with pytest.raises(InputError, match="tracker=tensorboard needs tensorboard or tensorboardX: pip install"):
        check_tracker("tensorboard")
    with pytest.raises(InputError, match="tracker=wandb needs wandb: pip install wandb"):
        check_tracker("wandb")


def test_the_live_view_shows_stage_and_state_at_any_width() -> None:
    screen = StringIO()
    note = "loss 2.743 · validation 3.952 · removed 23.7% · 12,912 tokens/s · 812 MiB"
    with NotedBars(console=Console(file=screen, force_terminal=True, width=80), auto_refresh=False) as bars:
        progress = TerminalProgress(bars)
        progress.stage("train", 10)
        progress.advance(4, note)
        bars.refresh()
        assert note in screen.getvalue()
        progress.stage("save")
        assert not bars.note
        progress.close()


def test_memory_in_use_counts_what_is_held() -> None:
    before = memory_in_use(torch.device("cpu"))
    # Not a tensor, which may get what an earlier one gave back and the allocator kept.
    with mmap.mmap(-1, 2**25) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert memory_in_use(torch.device("cpu")) - before > 0.9 * 2**25


def test_the_text_tells_of_sensitivity_refit_and_teacher(facts: Facts) -> None:
    results = copy.deepcopy(facts.results)
    refit = {"repaired": 0.5, "blend": 0.5, "validation_loss": {"0.5": 3.25, "1.0": None}}
    teacher = {"teacher_steps": {"cached": 4}, "teacher_bytes": 2**20, "teacher_seconds": 1.25}
    results["training"] |= {"compensation": refit, "distillation": teacher}
    changed = dataclasses.replace(facts, results=results)
    text = write_report(changed)
    assert facts.sensitivity
    for group in (*facts.sensitivity.groups.values(), *facts.sensitivity.together.values()):
        assert f"{group.mean:.4f}" in text.partition("## Sensitivity")[2]
    for told in (text, "".join(Page(write_page(changed)).words)):
        assert "50% of the refit was best on held-out text (loss 3.250 with 50%, not finite with 100%)" in told
        assert re.search("4 steps by `?cached`?; that took 1.0 MiB and 1.2 s", told)
    assert "## Sensitivity" not in write_report(dataclasses.replace(facts, sensitivity=None))
