"""Files of at most 300 lines, functions of at most 40; the longer ones are listed with a reason.

`python tests/test_sizes.py` lists every one.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from source_trees import nodes

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = {"file": 300, "function": 40}

# "path" or "path:function" below textdiff/ -> why it is one piece.
REASONS: dict[str, str] = {
    "commands/batch.py:generate_batch": "one file of prompts, all under the lock of its output",
    "commands/compare.py:compare": "half of it is the docstring, which is the help of the verb",
    "models/cache.py:exact_slice": "half of it says which positions the slice holds",
    "models/denoiser.py:forward": "the signature of transformers' models, argument by argument",
    "models/denoiser.py:hidden": "the network, from tokens to hidden states",
    "sampling/constraints/automata.py:byte_automaton": "one subset construction",
    "sampling/constraints/automata.py:of": "one walk of the vocabulary through the automaton",
    "sampling/template.py:parse_prompts": "half of it is the docstring and the refusals",
}


def sizes() -> Iterator[tuple[str, str, int]]:
    """Kind, name and number of lines of every file and function."""
    for path in sorted((ROOT / "textdiff").rglob("*.py")):
        name, text = path.relative_to(ROOT / "textdiff").as_posix(), path.read_text()
        yield "file", name, len(text.splitlines())
        for node in nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield "function", f"{name}:{node.name}", node.end_lineno - node.lineno + 1


@cache
def too_long() -> list[tuple[str, str, int]]:
    return [(kind, name, lines) for kind, name, lines in sizes() if lines > MOST_LINES[kind]]


@pytest.mark.parametrize("kind", MOST_LINES)
def test_long_pieces_have_a_reason(kind):
    places = [
        f"{name}: {lines}" for k, name, lines in too_long() if k == kind and name not in REASONS
    ]
    assert not places, "\n".join(["", *places])


def test_every_reason_is_needed():
    assert set(REASONS) <= {name for _, name, _ in too_long()}
    assert all(len(reason) > 10 for reason in REASONS.values())


if __name__ == "__main__":
    for kind, name, lines in too_long():
        print(f"{lines:4} {kind:8} {name}  {REASONS.get(name, '')}")
