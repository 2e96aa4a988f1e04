"""The recipe: a whole run as one validated document (its sections are in `settings`)."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from regrow.errors import InputError
from regrow.settings import (
    Analysis,
    Compensation,
    Data,
    Distillation,
    Evaluation,
    Generate,
    Lora,
    Output,
    Pruning,
    Recovery,
    Search,
    Section,
    Training,
)

MOST_VALUES = 100_000
"""In a recipe."""


class Recipe(Section):
    """A whole run."""

    name: str = Field(default="custom", description="Shown in reports.")
    description: str = Field(default="", description="One line on what it is.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Source of all chance in the run.")
    device: str = Field(default="auto", description="auto: the first CUDA GPU, else the CPU.")
    data: Data = Data()
    generate: Generate = Generate()
    lora: Lora = Lora()
    pruning: Pruning = Pruning()
    analysis: Analysis = Analysis()
    search: Search = Search()
    compensation: Compensation = Compensation()
    training: Training = Training()
    distillation: Distillation = Distillation()
    recovery: Recovery = Recovery()
    evaluation: Evaluation = Evaluation()
    output: Output = Output()

    def override(self, settings: Mapping[str, Any]) -> "Recipe":
        """This recipe with `key.path` -> value changed, validated anew."""
        tree = self.model_dump(mode="json")
        _change(tree, settings)
        return parse_recipe(tree, self.name)

    @property
    def finalists(self) -> int:
        """How many of a search's candidates are trained before one is chosen; 1: none is."""
        if self.pruning.shape == "free" or not self.search.evaluations:
            return 1
        carried = self.compensation.carrier == "adapter" and self.compensation.method != "none"
        return self.search.finalists or (2 if carried else 1)

    def with_sparsity(self, share: float, basis: str = "block") -> "Recipe":
        """This recipe with a share of the block parameters (or of `total`) to remove; a target stays written in it."""
        pruning = self.pruning.model_copy(update={"sparsity": share, "basis": basis})
        return self.model_copy(update={"pruning": pruning})


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes in the package, and their YAML text."""
    folder = resources.files("regrow") / "recipes"
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def load_recipe(name: str | Path = "regrow", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A shipped recipe by name, or a YAML file, with `key.path` overrides.

    Raises:
        InputError: if there is no such recipe, it is not valid YAML, or a key or value is wrong.
    """
    shipped, name = shipped_recipes(), str(name)
    if name in shipped:
        text = shipped[name]
    elif Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {name}: cannot be read: {error}") from error
    else:
        raise InputError(
            f"there is no recipe {name!r}{_suggest(name, shipped)}; shipped: {', '.join(shipped)}; or give a YAML file"
        )
    tree = _read_yaml(text, f"recipe {name}")
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"recipe {name}: must be a mapping of keys to values")
    _change(tree, overrides or {})
    return parse_recipe(tree, name)


def _read_yaml(text: str, told: str) -> Any:
    """Plain values from YAML that may hold anything.

    Raises:
        InputError: if it is not YAML, or its values cannot be a recipe's (`_size`).
    """
    try:
        tree = yaml.safe_load(text)
    except Exception as error:  # a tag or a number that is not what it says fails in many ways
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise InputError(f"{told}{line}: not valid YAML: {problem}") from error
    check_values(tree, told)
    return tree


def check_values(tree: Any, told: str) -> None:
    """Refuse what cannot be written down again, or grows beyond measure when it is: YAML's aliases can do that.

    Raises:
        InputError: if a value holds itself, there are too many, or a string is no text.
    """
    if _size(tree, {}, told) > MOST_VALUES:
        raise InputError(f"{told}: more than {MOST_VALUES:,} values, aliases written out; that is no recipe")


def _size(value: Any, known: dict[int, int], told: str) -> int:
    """How many values there are, each container looked at once."""
    if isinstance(value, str) and (
        "\0" in value or (not value.isascii() and value != value.encode(errors="ignore").decode())
    ):
        raise InputError(f"{told}: {value!r:.60} holds characters that are no text")
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # if it is met again before it is done, it holds itself
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        try:
            known[id(value)] = 1 + sum(_size(part, known, told) for part in parts)
        except RecursionError as error:
            raise InputError(f"{told}: values are nested too deeply") from error
    return known[id(value)]


def parse_recipe(tree: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Validate a tree of plain values.

    Raises:
        InputError: one line that names the key and what was meant.
    """
    check_values(tree, f"recipe {name}")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"recipe {name}: {_explain(error)}") from error


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`key.path=value` strings, values read as YAML.

    Raises:
        InputError: if one has no `=` or its value is not YAML.
    """
    result: dict[str, Any] = {}
    for assignment in assignments:
        path, separator, value = assignment.partition("=")
        if not separator or not path.strip():
            raise InputError(f"--set {assignment!r}: write key.path=value, for example lora.rank=16")
        result[path.strip()] = _read_yaml(value, f"--set {assignment!r:.200}")
    return result


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def explain_fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """`(key.path, description, default)` of every field."""
    for key, field in section.model_fields.items():
        if (part := _as_section(field.annotation)) is not None:
            yield from explain_fields(part, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", field.description or "", field.default


def _change(tree: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Set `key.path` -> value. A sparsity asked for takes the place of a target that stands in the recipe."""
    asked = [key for key in ("pruning.sparsity", "pruning.target") if settings.get(key) is not None]
    if len(asked) == 2:
        raise InputError("a sparsity and a target are both asked for; give --sparsity or --target, not both")
    for path, value in settings.items():
        _set(tree, path, value)
    if asked == ["pruning.sparsity"]:
        _set(tree, "pruning.target", None)


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    section: type[BaseModel] | None = Recipe
    for key in parents:
        field = section.model_fields.get(key) if section else None
        section = _as_section(field.annotation) if field else None
        child = tree.setdefault(key, {})
        if not isinstance(child, dict) or (field is not None and section is None):
            raise InputError(f"--set {path}: {key!r} is a value, not a section")
        tree = child
    tree[last] = value


def _as_section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or None if it holds a value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _suggest(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _section_at(path: Sequence[Any]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for key in path:
        if isinstance(key, str):  # a number is a place in a list of what has been found already
            section = next(_sections_of(section.model_fields[key].annotation))
    return section


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in what a field may hold: itself, one of several, or what a tuple is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_of(part)


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    location = first["loc"]
    path = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _section_at(location[:-1]).model_fields
        hint = _suggest(str(location[-1]), known) or f"; known here: {', '.join(known)}"
        return f"unknown key {path!r}{hint}"
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "string_pattern_mismatch":  # a reader is better told in words
        wanted = _section_at(location[:-1]).model_fields[str(location[-1])].description or message
        message = f"wanted: {wanted[0].lower()}{wanted[1:].rstrip('.')}"
    return f"{path} = {first['input']!r:.300}: {message}"
