"""Syntax trees of the repository's files, each parsed and walked once in a process."""

import ast
from functools import cache
from pathlib import Path


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a file, breadth first."""
    return list(ast.walk(tree(path)))
