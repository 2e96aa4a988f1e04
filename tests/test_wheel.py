"""The wheel holds all that the package needs and nothing else, and its command works wherever it is called."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from regrow.recipe import shipped_recipes

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src", "tests", "scripts", "benchmarks", "docs")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves folders beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "project" / name, ignore=unwanted)
        else:
            (folder / "project").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "project" / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "project"]
    subprocess.run([*PIP, *build], check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_what_the_wheel_holds(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    sources = ROOT / "src"
    there = {path.relative_to(sources).as_posix() for path in (sources / "regrow").rglob("*") if path.is_file()}
    assert package == {name for name in there if "__pycache__" not in name}
    assert {"regrow/py.typed", "regrow/recipes/regrow.yaml", "regrow/demo/model/model.safetensors"} <= package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_installed_command(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, that has the dependencies from this one."""
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel], check=True)

    (tmp_path / "elsewhere").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def output(*argv: str | Path) -> str:
        done = subprocess.run(
            argv, capture_output=True, text=True, cwd=tmp_path / "elsewhere", env=environment, check=True
        )
        return done.stdout

    assert output(python, "-c", "import regrow; print(regrow.__file__)") == f"{site / 'regrow' / '__init__.py'}\n"
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    version = HeaderParser().parsestr(zipfile.ZipFile(wheel).read(metadata).decode())["Version"]
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    command = python.with_name("regrow")
    assert output(command, "--version") == f"regrow {version}\n"
    assert [line.split()[0] for line in output(command, "recipes").splitlines()] == list(shipped_recipes())
