"""A text corpus that every Python installation already carries.

Two sources, both read from files and never downloaded:

* the language reference topics behind ``help("if")`` (``pydoc_data.topics``), one document each;
* the docstrings of the standard library, one document per module. Modules are parsed, not
  imported, so building the corpus has no side effects and does not depend on what can be imported.

Together they are about two megabytes of technical English and signatures: enough to train a toy
language model and to tell a good pruned model from a bad one.
"""

import ast
import hashlib
import json
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from regrow.checkpoint.files import write_text
from regrow.errors import InputError

HELD_OUT_PERCENT = 10
_SPLIT_SALT = 275  # with it, a tenth of the topics' and of the modules' text is held out, over many packages
MIN_DOCUMENT_CHARS = 200
MIN_DOCUMENTS = 100

# Folders without prose of their own: test suites, character tables, bundled applications.
_SKIPPED_FOLDERS = {"__pycache__", "encodings", "idlelib", "lib-dynload", "pydoc_data", "turtledemo"}
_SKIPPED_FOLDERS |= {"dist-packages", "idle_test", "site-packages", "test", "tests"}

# A paragraph this long that occurs a second time is a copy, not a coincidence.
_MIN_COPY_CHARS = 60


@dataclass(frozen=True)
class Corpus:
    """Documents to train and calibrate on, and documents to measure on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class _Document:
    """One module or topic before clean-up; `group` decides the side of the split."""

    group: str
    title: str
    sections: list[tuple[str, str]]  # (heading, text), heading may be empty


def standard_library_corpus() -> Corpus:
    """Build the corpus from the running interpreter's own documentation.

    The split looks only at names, through a stable hash: a top-level package goes to one side
    with all its modules (``email.message`` never trains a model that ``email.policy`` measures),
    and so does a topic. This makes the held-out share lumpy (roughly a tenth, as a few packages
    are large) but keeps a module on the same side for every Python version and platform.

    Text shared between documents would leak through any split by name, and there is a lot of it:
    the topic ``compound`` contains the topics ``if``, ``for`` and ``while``, and pairs such as
    ``posixpath`` and ``ntpath`` share docstrings. So a long paragraph is kept only where it occurs
    first. Documents left with fewer than 200 characters are dropped.

    Raises an `InputError` if this Python was installed without sources or docstrings.
    """
    sides: dict[bool, list[str]] = {False: [], True: []}
    seen: set[str] = set()
    for document in [*_topic_documents(), *_module_documents(Path(sysconfig.get_path("stdlib")))]:
        text = _render(document, seen)
        if len(text) >= MIN_DOCUMENT_CHARS:
            sides[_is_held_out(document.group)].append(text)
    if len(sides[False]) + len(sides[True]) < MIN_DOCUMENTS:
        raise InputError(
            f"the demo corpus needs the standard library's sources with their docstrings, but "
            f"{sysconfig.get_path('stdlib')} has almost none: use a full Python installation"
        )
    return Corpus(train=tuple(sides[False]), held_out=tuple(sides[True]))


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """Write the corpus as ``train.jsonl`` and ``held_out.jsonl`` (field ``text``) into `folder`."""
    corpus = standard_library_corpus()
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    _write_jsonl(train, corpus.train)
    _write_jsonl(held_out, corpus.held_out)
    return train, held_out


def _topic_documents() -> list[_Document]:
    """The topics, longest first, so that chapters stay whole and their excerpts count as copies."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    ordered = sorted(topics.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_Document(f"topic:{name}", "", [("", text)]) for name, text in ordered]


def _module_documents(stdlib: Path) -> Iterator[_Document]:
    """The docstrings of every module under `stdlib`, in the order of the module names."""
    for parts, path in sorted(_modules(stdlib)):
        try:
            with warnings.catch_warnings(), tokenize.open(path) as file:
                warnings.simplefilter("ignore")  # invalid escapes in old sources are not our concern
                tree = ast.parse(file.read())
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        sections = [("", ast.get_docstring(tree) or ""), *_docstrings(tree)]
        yield _Document(f"module:{parts[0]}", f"Module {'.'.join(parts)}", sections)


def _modules(stdlib: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in _SKIPPED_FOLDERS]
        package = Path(folder).relative_to(stdlib).parts
        for file in files:
            name = file.removesuffix(".py")
            if file.endswith(".py") and name.isidentifier() and not name.startswith("_sysconfigdata"):
                parts = package if name == "__init__" else (*package, name)
                if parts:
                    yield parts, Path(folder, file)


def _docstrings(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Headings and docstrings of the classes and functions in `node`, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases = f"({', '.join(map(ast.unparse, child.bases))})" if child.bases else ""
            yield f"class {prefix}{child.name}{bases}", ast.get_docstring(child) or ""
            yield from _docstrings(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}({ast.unparse(child.args)})", ast.get_docstring(child) or ""
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from _docstrings(child, prefix)


def _render(document: _Document, seen: set[str]) -> str:
    """The document's text without the paragraphs in `seen`, to which its own are added."""
    blocks = []
    for heading, text in document.sections:
        body = "\n\n".join(_first_occurrences(text, seen))
        if body:
            blocks.append(f"{heading}\n{body}" if heading else body)
    if not blocks:
        return ""
    return "\n\n".join([document.title, *blocks] if document.title else blocks)


def _first_occurrences(text: str, seen: set[str]) -> Iterator[str]:
    clean = text.expandtabs().encode("utf-8", "replace").decode("utf-8")
    lines = (line.rstrip() for line in clean.splitlines())
    for paragraph in "\n".join(lines).strip("\n").split("\n\n"):
        key = " ".join(paragraph.split())
        if not key or key in seen:
            continue
        if len(key) >= _MIN_COPY_CHARS:
            seen.add(key)
        yield paragraph.strip("\n")


def _is_held_out(group: str) -> bool:
    digest = hashlib.sha256(f"{_SPLIT_SALT}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def _write_jsonl(path: Path, texts: Iterable[str]) -> None:
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
