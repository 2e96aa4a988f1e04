"""Whether the tests notice that code is wrong: a sample of mutants, each against the tests that reach its line.

    pip install cosmic-ray pytest-cov
    python -m pytest --cov=regrow --cov-context=test --cov-report=term --junitxml=build/tests.xml
    python scripts/mutation.py src/regrow/structure src/regrow/planning --results build/mutants.jsonl

The mutants are those of cosmic-ray's operators that need no arguments. Places in the code are drawn by chance, then a
mutant of each. Not drawn is what is no Python, and what only changes an annotation or a guard (`assert`,
`zip(strict=)`, `dataclass(frozen=)`): as long as the code is right a guard does nothing that a test could miss. Each
mutant is tried on a copy of the sources, in a process forked from one that has imported the libraries, against the
tests that run through its statement, cheapest first, as many as take `--seconds` by the measurement. Code that runs
when its module is imported is reached by all tests of that module; what tests do in processes of their own reaches
nothing.

A mutant is killed when a test fails or nothing can be imported, out of time when the tests take far longer than they
did. In the end the tests that have killed must pass without a mutant. Started again, this goes on where it stopped.
"""

import argparse
import ast
import compileall
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import coverage
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "hypothesis", "pytest", "torch._dynamo", "torch.export", "transformers", "peft", "datasets", "safetensors.torch",
    "matplotlib.pyplot", "typer", "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""Before processes are forked: they take longer than most tests."""


@dataclass(frozen=True)
class Place:
    """Where an operator applies, as its `occurrence`-th place in a file."""

    file: Path
    operator: str
    occurrence: int
    line: int
    column: int

    @property
    def key(self) -> tuple[Path, int, int, str]:
        """The same for all operators that put one thing in another's place."""
        return self.file, self.line, self.column, self.operator.split("_")[0]


def places(file: Path) -> Iterator[Place]:
    """All that could be changed in a file."""
    nodes = list(ast_nodes(get_ast_from_path(file)))
    for name in operator_names():
        if get_operator(name).arguments():
            continue
        found = (start for node in nodes for start, _ in get_operator(name)().mutation_positions(node))
        for occurrence, (line, column) in enumerate(found):
            yield Place(file, name, occurrence, line, column)


def mutated(place: Place) -> str | None:
    """The file's text as a mutant has it; None if that is no change."""
    before = place.file.read_text(encoding="utf-8")
    after: str = mutate_code(before, get_operator(place.operator)(), place.occurrence)
    try:
        same = meaning(before) == meaning(after)
    except SyntaxError:
        return None
    return None if same else after


def meaning(text: str) -> str:
    """A module's syntax tree without annotations and guards, on which nothing depends while the code is right."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        match node:
            case ast.Assert():
                node.test, node.msg = ast.Constant(None), None
            case ast.keyword(arg="strict" | "frozen"):
                node.value = ast.Constant(None)
            case ast.arg() | ast.AnnAssign():
                node.annotation = ast.Constant(None)
            case ast.FunctionDef():
                node.returns = None
    return ast.dump(tree)


def draw(files: Sequence[Path], count: int, seed: int) -> list[tuple[Place, str]]:
    """Mutants by chance, with the text of their files."""
    by_key: dict[tuple[Path, int, int, str], list[Place]] = {}
    for place in (place for file in files for place in places(file)):
        by_key.setdefault(place.key, []).append(place)
    chance = random.Random(seed)
    in_turn = (chance.choice(by_key[key]) for key in chance.sample(list(by_key), len(by_key)))
    return list(islice(((place, text) for place in in_turn if (text := mutated(place))), count))


def statement(file: Path, line: int) -> range:
    """The lines of the innermost statement around a line, without the statements inside it."""
    around = [range(line, line + 1)]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            around.append(
                range(node.lineno, max(node.lineno + 1, body[0].lineno) if body else (node.end_lineno or 0) + 1)
            )
    return min((lines for lines in around[1:] if line in lines), key=len, default=around[0])


def seconds_by_test(report: Path) -> dict[str, float]:
    """What each test took, by pytest's JUnit report."""
    cases = [case.attrib for case in ElementTree.parse(report).iter("testcase")]
    return {f"{case['classname'].replace('.', '/')}.py::{case['name']}": float(case["time"]) for case in cases}


def reaching(place: Place, data: coverage.CoverageData, seconds: dict[str, float], most: float) -> list[str]:
    """The tests that run through a statement, cheapest first, as many as take `most` seconds together."""
    name = str(place.file.relative_to(ROOT))
    by_line = {
        line: {context.rpartition("|")[0] for context in found} - {""}
        for measured in data.measured_files()
        if measured.endswith(name)
        for line, found in data.contexts_by_lineno(measured).items()
    }
    tests = set().union(*(by_line.get(line, set()) for line in statement(place.file, place.line)))
    chosen: list[str] = []
    total = 0.0
    for test in sorted(tests or set().union(*by_line.values()), key=lambda test: (seconds.get(test, most), test)):
        total += seconds.get(test, most)
        if chosen and total > most:
            break
        chosen.append(test)
    return chosen


class Failures:
    """Leaves the names of tests that fail."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Pytest tells what became of a test."""
        if report.failed:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(report.nodeid + "\n")


def run_tests(tests: Sequence[str], scratch: Path, until_first: bool) -> None:
    """In a process of its own, which this ends."""
    import hypothesis
    import pytest

    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(scratch / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.path.insert(0, str(scratch / "src"))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": sys.path[0], "PYTHONDONTWRITEBYTECODE": "1"}
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutation")
    os.chdir(ROOT)
    code = 1
    try:
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={scratch / 'tests'}", *["-x"] * until_first]
        code = int(pytest.main([*options, *tests], plugins=[Failures(scratch / "failed")]))
    finally:
        os._exit(code)


def outcome(tests: Sequence[str], scratch: Path, seconds: float, until_first: bool = True) -> tuple[str, list[str]]:
    """What becomes of tests, and which of them fail; none of them if nothing could be imported."""
    (scratch / "failed").write_text("")
    child = os.fork()
    if not child:
        run_tests(tests, scratch, until_first)
    until, done, status = time.monotonic() + seconds, 0, 0
    while not done and time.monotonic() < until:
        time.sleep(0.05)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "out of time", []
    failed = (scratch / "failed").read_text().splitlines()
    return "killed" if os.waitstatus_to_exitcode(status) else "survived", failed


def try_mutant(place: Place, text: str, tests: Sequence[str], scratch: Path, seconds: float) -> dict[str, Any]:
    """What became of a mutant, as a line of the results."""
    file = scratch / place.file.relative_to(ROOT)
    original = file.read_bytes()
    file.write_text(text, encoding="utf-8")
    start = time.monotonic()
    became, failed = outcome(tests, scratch, seconds) if tests else ("survived", [])  # none: pytest would run all
    file.write_bytes(original)
    return {
        "place": f"{place.file.relative_to(ROOT)}:{place.line}:{place.column}",
        "operator": place.operator.rpartition("/")[2],
        "code": text.splitlines()[place.line - 1].strip(),
        "outcome": became,
        "killers": failed,
        "tests": len(tests),
        "seconds": round(time.monotonic() - start, 1),
    }


class Results:
    """What is known of mutants, kept in a file; what is added last counts."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.by_number: dict[int, dict[str, Any]] = {(one := json.loads(line))["number"]: one for line in lines}

    def add(self, number: int, result: dict[str, Any]) -> None:
        """Keep it."""
        self.by_number[number] = {"number": number, **result}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.by_number[number]) + "\n")

    def told(self, number: int) -> str:
        """A mutant, and what became of it."""
        one = self.by_number[number]
        by = " ".join(one["killers"]) or f"{one['tests']} tests"
        return f"{number}: {one['place']}: {one['code']}\n  {one['outcome']}, {by}, {one['seconds']} s"

    def figure(self) -> str:
        """How many of those that were tried have been killed."""
        counts = Counter(one["outcome"] for one in self.by_number.values())
        return f"{counts['killed']} of {counts.total()} killed, {counts['out of time']} out of time"

    def killers(self) -> list[str]:
        """The tests that have killed."""
        return sorted({test for one in self.by_number.values() for test in one["killers"]})


def main() -> None:
    """Draw mutants, try them, tell which survive."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--sample", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of tests for one mutant")
    parser.add_argument("--coverage", default=".coverage", help="what pytest-cov has left")
    parser.add_argument("--report", type=Path, default=Path("build/tests.xml"), help="pytest's JUnit report")
    parser.add_argument("--results", type=Path, default=Path("build/mutants.jsonl"), help="one line a mutant")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the sample")
    parser.add_argument("--tests", nargs="*", default=[], help="to try before those that reach the line")
    arguments = parser.parse_args()
    data = coverage.CoverageData(arguments.coverage)
    data.read()
    seconds = seconds_by_test(arguments.report)
    files = sorted(file for folder in arguments.folders for file in folder.resolve().rglob("*.py"))
    drawn = dict(enumerate(draw(files, arguments.sample, arguments.seed)))
    results = Results(arguments.results)
    wanted = set(drawn) - set(results.by_number) if arguments.only is None else set(arguments.only)
    for name in IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shutil.copytree(ROOT / "src", scratch / "src", ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(scratch / "src", quiet=1)
        start = time.monotonic()
        for tried, number in enumerate(sorted(wanted)):
            place, text = drawn[number]
            tests = [*arguments.tests, *reaching(place, data, seconds, arguments.seconds)]
            results.add(number, try_mutant(place, text, tests, scratch, 3 * arguments.seconds + 60))
            left = (time.monotonic() - start) / (tried + 1) * (len(wanted) - tried - 1) / 60
            print(f"{results.told(number)}\n  {results.figure()}, some {left:.0f} minutes left", flush=True)
        _, failed = outcome(results.killers(), scratch, 60 * len(results.killers()), until_first=False)
    print(f"{results.figure()}, sample {arguments.sample}, seed {arguments.seed}")
    if failed:
        sys.exit(f"these fail without a mutant, so they have killed none: {', '.join(failed)}")


if __name__ == "__main__":
    main()
