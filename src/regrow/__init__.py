"""regrow: cut a large language model back to the size its hardware can carry, and regrow its skill through LoRA.

    import regrow
    result = regrow.prune("Qwen/Qwen3-0.6B", "out", sparsity=0.3, data="wikitext")

The public names are imported when they are first used, so that `import regrow` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.comparison.run import Comparison, compare
    from regrow.criteria.evidence import Evidence
    from regrow.errors import InputError
    from regrow.formats.export import export
    from regrow.measure import analyze, bench, evaluate
    from regrow.planning.plan import Plan
    from regrow.planning.sensitivity import Sensitivity
    from regrow.recipe import Recipe, load_recipe
    from regrow.results import Result
    from regrow.reuse import apply, scatter
    from regrow.run import prune
    from regrow.structure.finding import find_groups
    from regrow.structure.groups import Group, Groups

_HOMES = {
    "Comparison": "regrow.comparison.run",
    "Evidence": "regrow.criteria.evidence",
    "Group": "regrow.structure.groups",
    "Groups": "regrow.structure.groups",
    "InputError": "regrow.errors",
    "Plan": "regrow.planning.plan",
    "Recipe": "regrow.recipe",
    "Result": "regrow.results",
    "Sensitivity": "regrow.planning.sensitivity",
    "analyze": "regrow.measure",
    "apply": "regrow.reuse",
    "bench": "regrow.measure",
    "compare": "regrow.comparison.run",
    "evaluate": "regrow.measure",
    "export": "regrow.formats.export",
    "find_groups": "regrow.structure.finding",
    "load_recipe": "regrow.recipe",
    "prune": "regrow.run",
    "scatter": "regrow.reuse",
}

__all__ = [
    "Comparison",
    "Evidence",
    "Group",
    "Groups",
    "InputError",
    "Plan",
    "Recipe",
    "Result",
    "Sensitivity",
    "analyze",
    "apply",
    "bench",
    "compare",
    "evaluate",
    "export",
    "find_groups",
    "load_recipe",
    "prune",
    "scatter",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regrow' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
