"""An import goes down the floors, never up."""

import ast
from pathlib import Path

import regrow

FLOORS = {
    "errors": 0, "progress": 0, "interrupt": 0, "clock": 0, "launcher": 0, "sharding": 0, "processes": 0, "settings": 0,
    "recipe": 0, "data": 0, "given": 0,
    "structure": 1, "compensation": 1, "criteria": 1,
    "planning": 2,
    "analysis": 3, "recovery": 3, "evaluation": 3, "report": 3, "checkpoint": 3, "formats": 3,
    "aim": 4, "trials": 4, "walk": 4, "run": 4, "measure": 4, "reuse": 4, "preflight": 4, "text": 4, "demo": 4,
    "comparison": 4, "resume": 4, "results": 4,
    "cli": 5, "cli_compare": 5, "cli_reuse": 5, "console": 5, "terminal": 5, "__init__": 5, "__main__": 5,
}  # fmt: skip
PACKAGE = Path(regrow.__file__).parent


def test_every_module_has_a_floor() -> None:
    there = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    assert there - {"__pycache__", "recipes", "py"} - {"py.typed"} == set(FLOORS)


def test_imports_go_down() -> None:
    climbing = []
    for file in PACKAGE.rglob("*.py"):
        own = FLOORS[file.relative_to(PACKAGE).parts[0].removesuffix(".py")]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("regrow."):
                target = node.module.split(".")[1]
                if FLOORS[target] > own:
                    climbing.append(f"{file.relative_to(PACKAGE)} imports {node.module}")
    assert not climbing


def test_no_file_is_too_long_to_read() -> None:
    assert not [file.name for file in PACKAGE.rglob("*.py") if file.read_text().count("\n") > 400]
