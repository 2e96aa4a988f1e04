"""Every code block of the README and the documentation does what it shows, on a tiny model and a short text."""

import re
import shlex
from pathlib import Path

import docs_pages
import pytest
import torch
import typer
from conftest import mxfp4_checkpoint
from safetensors.torch import load_file

import regrow
from regrow.cli import app
from regrow.criteria.evidence import Evidence, Linear
from regrow.criteria.registry import find_criterion
from regrow.recipe import load_recipe, parse_assignments, shipped_recipes
from regrow.structure.gates import GateMoments

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

INSTEAD = {
    "400": "4",  # steps
    "[128, 2048]": "[16, 32]",
}
"""What a page shows of a real model -> what a tiny one can do in a moment."""


def blocks(language: str) -> list[object]:
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}")
        for page in PAGES
        for text in [page.read_text(encoding="utf-8")]
        for match in BLOCK.finditer(text)
        for found, code in [match.groups()]
        if found == language
    ]


def commands(code: str) -> list[list[str]]:
    """The lines of a shell block that call regrow, as lists of words."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    lines = [line[line.index("regrow") :] if "-m" in line and "regrow" in line else line for line in lines]  # torchrun
    parts = [part for line in lines for part in _parted(line)]
    return [part[1:] for part in parts if part and Path(part[0]).name == "regrow"]


def _parted(words: list[str]) -> list[list[str]]:
    """Commands joined by `&&`."""
    if "&&" not in words:
        return [words]
    place = words.index("&&")
    return [words[:place], *_parted(words[place + 1 :])]


@pytest.mark.parametrize("code", blocks("bash"))
def test_commands_are_understood(code: str) -> None:
    verbs = vars(typer.main.get_command(app))["commands"]
    assert all(verb in verbs for verb, *_ in commands(code))
    for verb, *words in commands(code):
        command = verbs[verb]
        context = command.make_context(verb, words)  # fails on an unknown option or a missing argument
        given = context.params
        names = [given[key] for key in ("recipe",) if given.get(key)] + (given.get("recipes") or "").split(",")
        for name in filter(None, names):
            load_recipe(re.split(r"[+@]", name)[0], parse_assignments(given.get("assign") or []))


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(
    code: str, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lean: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my_text.jsonl", "other_text.txt"):
        (tmp_path / name).write_text(text.read_text())
    if 'from_pretrained("out/model")' in code:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model").symlink_to(checkpoint)
    packed = tmp_path / "packed"
    if "openai/gpt-oss-20b" in code:
        mxfp4_checkpoint(packed)
    for shown, tried in {"Qwen/Qwen3-0.6B": str(checkpoint), "openai/gpt-oss-20b": str(packed), **INSTEAD}.items():
        code = code.replace(shown, tried)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, "block", "exec"), names)  # whatever goes wrong raises
    assert len(names) > 2, "a block that leaves no name has done nothing"


def test_a_checkpoint_in_mxfp4_is_refused_and_can_be_written_as_the_page_says(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lean: None
) -> None:
    weights = mxfp4_checkpoint(tmp_path / "packed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(regrow.InputError, match=r"quantised \(mxfp4\)"):
        regrow.prune("packed", "out", "magnitude", data=str(text), sparsity=0.3, steps=1)
    (code,) = [code for _, code in BLOCK.findall((ROOT / "docs" / "models.md").read_text()) if "Mxfp4Config" in code]
    exec(compile(code.replace("openai/gpt-oss-20b", "packed"), "block", "exec"), {})
    written = load_file(tmp_path / "gpt-oss-20b-bf16" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in written.items()} == {n: t.tolist() for n, t in weights.items()}


def test_the_criterion_on_the_page_scores_units(tmp_path: Path) -> None:
    (code,) = BLOCK.findall((ROOT / "docs" / "criteria.md").read_text())[0][1:]
    (tmp_path / "my_criterion.py").write_text(code)
    criterion = find_criterion(f"{tmp_path / 'my_criterion.py'}:energy_and_damage")
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    moments = GateMoments.zeros(2)
    moments.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    evidence = Evidence("e", "ffn", 2, [Linear("m", weight, 1, torch.tensor([[0], [1]]))], gate=moments)
    assert criterion.needs == {"gate"}
    assert criterion.score(evidence).tolist() == [10.0 * 5.0, 20.0 * 2.0]  # ‖columns‖² times mean squares


def test_the_pages_show_every_recipe_and_every_setting() -> None:
    page = docs_pages.on_page_markdown((ROOT / "docs" / "methods" / "index.md").read_text())
    assert all(f"`{name}`" in page for name in shipped_recipes())
    assert "`distillation.teacher_dtype`" in docs_pages.on_page_markdown("<!-- settings -->")
    assert "criterion: lora\n" in docs_pages.on_page_markdown("<!-- recipe loraprune -->")
