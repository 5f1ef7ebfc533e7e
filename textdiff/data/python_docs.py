"""The corpus that needs no download: the English prose inside every Python installation.

It consists of the language reference that `help()` shows (`pydoc_data.topics`) and of the
docstrings of the standard library. They are read from the source files with `ast`: no module is
imported. The text depends on the Python version, so a run records the version and a hash. This
module needs nothing beyond the standard library.
"""

import ast
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from textdiff.errors import DataError

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
_SHORTEST_DOCUMENT_CHARACTERS = 200
_SMALLEST_CORPUS_CHARACTERS = 500_000
_PROSE_LETTERS = 0.75
_BODIES = ("body", "handlers", "orelse", "finalbody", "cases")  # of statements, in source order
_RULE = re.compile(r"[ \t]*([*=~^+#.-])\1{2,}[ \t]*")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


def python_docs() -> list[str]:
    """Return the documentation of this Python: about 1.8 million characters of English prose.

    One document per `help()` topic and one per module of the standard library, both in sorted
    order. A module's has its own docstring and those of its classes and functions in source order.
    The text is cleaned by three rules, so that a small model learns English, not tables of digits:

    - rows of punctuation that underline a heading are dropped, as is trailing white space;
    - a paragraph stays only if at least three quarters of its visible characters are letters and
      it holds neither an interpreter prompt nor a grammar rule (this removes doctests, tables and
      most code);
    - a paragraph that occurred before is dropped: topics quote each other at length, and a
      validation split must not hold what the training split repeats.

    Documents with fewer than 200 characters left are skipped.

    Returns:
        The documents, equal on every call.

    Raises:
        DataError: this installation carries no documentation (a stripped or embedded Python).
    """
    seen: set[str] = set()
    documents = [_clean(texts, seen) for texts in (*_topics(), *_modules())]
    kept = [text for text in documents if len(text) >= _SHORTEST_DOCUMENT_CHARACTERS]
    if sum(map(len, kept)) < _SMALLEST_CORPUS_CHARACTERS:
        raise DataError(
            "python-docs: this Python installation carries no library sources or documentation to "
            f"read (looked in {sysconfig.get_path('stdlib')}); name a text file as the source",
            code="no_python_docs",
        )
    return kept


def _topics() -> Iterator[list[str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield [topics[name]]


def _modules() -> Iterator[list[str]]:
    root = Path(sysconfig.get_path("stdlib"))
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    # Compared part by part as text, so that the order is the same under every file system.
    for path in sorted(relative, key=lambda path: path.parts):
        if _SKIPPED_FOLDERS.isdisjoint(path.parts):
            yield _docstrings(root / path)


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold invalid escapes
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []  # templates and fixtures that are not Python of this version
    return list(dict.fromkeys(_walk(tree)))


def _walk(node: ast.AST) -> Iterator[str]:
    """Yield docstrings in source order (`ast.walk` goes breadth first)."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield inspect.cleandoc(docstring)
    for body in _BODIES:  # expressions, most of the tree, hold no docstring
        for child in getattr(node, body, ()):
            yield from _walk(child)


def _clean(docstrings: list[str], seen: set[str]) -> str:
    kept = []
    for docstring in docstrings:
        lines = (line.rstrip() for line in docstring.splitlines())
        text = "\n".join(line for line in lines if not _RULE.fullmatch(line))
        for paragraph in _BLANK_LINES.split(text):
            paragraph = paragraph.strip("\n")
            if paragraph not in seen and _is_prose(paragraph):
                seen.add(paragraph)
                kept.append(paragraph)
    return "\n\n".join(kept) + "\n" if kept else ""


def _is_prose(paragraph: str) -> bool:
    visible = "".join(paragraph.split())
    letters = sum(map(str.isalpha, visible))
    if ">>>" in paragraph or "::=" in paragraph:
        return False
    return bool(visible) and letters >= _PROSE_LETTERS * len(visible)
