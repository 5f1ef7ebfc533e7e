"""Plain words: the part of the writing rules that a program can count.

`python tests/test_prose.py [RULE]` lists every place, as file:line. `ALLOWED` holds the number of
places that each rule still has; it only ever falls.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
from source_trees import nodes, tree

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = dict.fromkeys(
    (
        "word",
        "docstring head",
        "docstring verb",
        "docstring sentence",
        "page sentence",
        "variable",
        "definition",
        "module name",
        "public name",
    ),
    0,
)

# Expression -> the words to use.
WORDS = {
    r"laws?": "distribution",
    r"told": "conditional on, given as input; for people: reported",
    r"(?:is|are|was) no (?!longer|more\b|less\b|one\b)\w+": "is not a, has no",
    r"(?:pays?|paid|costs?) (?:\w+ )?nats": "contributes to the loss, to the bound",
    r"nats are paid": "contributes to the loss, to the bound",
    r"(?:is|are|was) said": "is reported",
    r"sees? to (?:it|that)": "ensures",
    r"that was not \((?:interrupted|killed)": "an uninterrupted run",
    r"which was not (?:interrupted|killed)": "an uninterrupted run",
    r"whole (?:job|step)": "all rows",
    r"hollow": "meta copy",
    r"one position late|a position late": "shifted right",
    r"heat|heated": "temperature",
    r"(?:is|are|as|too|so) dear|dearer": "costs more",
    r"ignorant|informed": "conditional, unconditional",
    r"nobody|anybody|somebody": "no user, no process",
    r"(?:does|do|did) not (?:know|want|care)": "does not depend on",
    r"knows|knew|wants|wishes": "depends on, reads, needs",
    r"(?:lies|lie|lay)(?! in wait)": "is",
    r"mends?|mended": "repairs, fixes",
    r"bears?|borne": "takes, supports",
}
HEADS = r"(?:What|Whether|Who|Whose|Which|How|Where|When)\b"
NOT_A_VERB = (
    r"(?:The|A|An|All|Every|Each|Some|Any|No|Its?|This|That|These|One|Of|For|With|If|As|\w+ of)\b"
)
# Imperative verbs that end in s; other first words in -s are third-person verbs or plural nouns.
VERBS_IN_S = {
    "Access",
    "Address",
    "Compress",
    "Cross",
    "Discuss",
    "Express",
    "Guess",
    "Pass",
    "Process",
}
VARIABLES = {"found", "mine", "some", "there", "behind", "late", "part"}
# Names of classes and functions -> the names to use.
NAMES = {
    "Scene": "SegmentInfo",
    "Audience": "callbacks",
    "Watcher": "Callback",
    "Feed": "StreamerCallback",
    "Reach": "ContextLimit",
    "Form": "ParsedPrompt",
    "Contrast": "GuidedPrediction",
    **dict.fromkeys(("Material", "Task", "Reading", "Showing"), "...Options"),
    **dict.fromkeys(("carrying", "losing_none", "losing_no_worker", "resting"), "a verb"),
    "fulfil": "run",
    "pace": "rate_exponent",
    "heat": "temperature",
    **dict.fromkeys(("hollow", "filled"), "meta_copy, materialized"),
}
MOST_WORDS = 25

# Python 3.12 and later make tokens of the text inside f-strings.
TEXT_TOKENS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}

Place = tuple[str, int, str]  # file below the root, line, remark


def modules() -> list[Path]:
    return sorted((ROOT / "textdiff").rglob("*.py"))


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def documented(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Nodes with a docstring, and it."""
    for node in nodes(path):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node, text


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that people read: comments, docstrings and messages of programs; whole pages."""
    if path.suffix == ".md":
        yield from ((number, text) for number, text in numbered_prose(path))
        return
    text = path.read_text()
    if path.suffix == ".yaml":
        comments = re.findall(r"^(?:.*?\s)?#(.*)$|^.*$", text, flags=re.M)
        yield from enumerate(comments, 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in TEXT_TOKENS:
            for offset, line in enumerate(token.string.splitlines()):
                if " " in line.strip():
                    yield token.start[0] + offset, re.sub(r"`[^`]*`", "`x`", line)


def numbered_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a page without code and without spans of code."""
    fenced = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            line = re.sub(r"`[^`]*`", "`x`", line)
            yield number, re.sub(r"\]\([^)]*\)", "]", line)


def banned_words() -> Iterator[Place]:
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    expression = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
    for path in [*modules(), *pages(), *configs]:
        for number, line in prose(path):
            for match in expression.finditer(line):
                yield name(path), number, f"{match[0]!r}: {advice(match[0])}"


def advice(word: str) -> str:
    return next(a for e, a in WORDS.items() if re.fullmatch(e, word, re.IGNORECASE))


def docstring_heads() -> Iterator[Place]:
    for path in modules():
        for node, text in documented(path):
            if re.match(HEADS, text):
                yield name(path), getattr(node, "lineno", 1), text.split("\n")[0]


def docstring_verbs() -> Iterator[Place]:
    """Functions whose docstring does not begin with an imperative verb; properties are nouns."""
    for path in modules():
        for node, text in documented(path):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_noun(node):
                continue
            word = re.match(r"\w*", text)[0]
            third_person = word.endswith("s") and word not in VERBS_IN_S
            if third_person or not word.istitle() or re.match(f"{HEADS}|{NOT_A_VERB}", text):
                yield name(path), node.lineno, f"{node.name}: {text.splitlines()[0]}"


def is_noun(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Properties are read like attributes."""
    decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
    return bool(decorators & {"property", "cached_property", "setter"})


def sentences(text: str) -> list[str]:
    text = re.sub(r"\(\)|\be\.g\.|\bi\.e\.|\b(?:Eq|Sec|Thm|App|Fig|vs|cf)\.", "x", text)
    text = re.sub(r"\(arXiv[^)]*\)|\((?:Eq|Sec)[^)]*\)|\((?:`[^`]*`(?:, | and )?)+\)", "", text)
    return re.split(r"(?<=[.!?])\s+|:\s+", text)


def length(sentence: str) -> int:
    """Words of a sentence: a span of code or a number is one, a sign is none."""
    sentence = re.sub(r"`[^`]*`|\[[^\]]*\]", "x", sentence)
    return len(re.findall(r"[^\W_][\w'’.,-]*", sentence))


def long_docstring_sentences() -> Iterator[Place]:
    for path in modules():
        for node, text in documented(path):
            before_sections = re.split(r"\n(?:Args|Attributes|Returns|Raises|Yields):\n", text)[0]
            paragraphs = [p for p in re.split(r"\n\s*\n", before_sections) if p[:1].isalpha()]
            for sentence in sentences(" ".join(" ".join(paragraphs).split())):
                if length(sentence) > MOST_WORDS:
                    remark = f"{length(sentence)}: {sentence[:60]}"
                    yield name(path), getattr(node, "lineno", 1), remark


def long_page_sentences() -> Iterator[Place]:
    for path in pages():
        for number, paragraph in paragraphs(path):
            for sentence in sentences(paragraph):
                if length(sentence) > MOST_WORDS:
                    yield name(path), number, f"{length(sentence)}: {sentence[:60]}"


def paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """Paragraphs and list items of a page, with their first lines' numbers; no tables, headings."""
    start, lines = 0, []
    for number, line in chain(numbered_prose(path), [(0, "")]):
        item = re.match(r"\s*(?:[-*]|\d+\.)\s", line)
        ends = item or not line.strip() or line.startswith(("|", "#", "<!", "!["))
        if ends and lines:
            yield start, " ".join(lines)
            lines = []
        if not ends or item:
            start = start if lines else number
            lines.append(line.strip().removeprefix("- ").removeprefix("> "))


def variables() -> Iterator[Place]:
    for path in modules():
        for node in nodes(path):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                if node.id in VARIABLES:
                    yield name(path), node.lineno, node.id
            elif isinstance(node, ast.arg) and node.arg in VARIABLES:
                yield name(path), node.lineno, node.arg


def definitions() -> Iterator[Place]:
    for path in modules():
        for node in nodes(path):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in NAMES:
                yield name(path), node.lineno, f"{node.name}: {NAMES[node.name]}"


def repeated_modules() -> Iterator[Place]:
    """Verbs may have the name of what they call, and `config` is a verb and a folder."""
    verbs = {path.stem for path in (ROOT / "textdiff" / "commands").glob("*.py")}
    stems = [p for p in modules() if p.stem not in {"__init__", "__main__", "config"}]
    counts = Counter(path.stem for path in stems if path.parent.name != "commands")
    counts.update(p.name for p in {p.parent for p in modules()} if p.name not in verbs)
    for path in stems:
        if counts[path.stem] > 1:
            yield name(path), 1, path.stem


def repeated_names() -> Iterator[Place]:
    """Public classes and functions of modules; the functions of verbs are called as the verb."""
    places = [
        (node.name, path, node.lineno)
        for path in modules()
        if path.parent.name != "commands"
        for node in tree(path).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    ]
    counts = Counter(public for public, _, _ in places)
    for public, path, line in places:
        if counts[public] > 1:
            yield name(path), line, public


RULES: dict[str, Callable[[], Iterator[Place]]] = {
    "word": banned_words,
    "docstring head": docstring_heads,
    "docstring verb": docstring_verbs,
    "docstring sentence": long_docstring_sentences,
    "page sentence": long_page_sentences,
    "variable": variables,
    "definition": definitions,
    "module name": repeated_modules,
    "public name": repeated_names,
}


@pytest.mark.parametrize("rule", RULES)
def test_writing_rules(rule):
    places = [f"{path}:{line} {remark}" for path, line, remark in RULES[rule]()]
    assert len(places) <= ALLOWED[rule], "\n".join(["", *places])


def test_the_table_of_places_names_every_rule():
    assert list(ALLOWED) == list(RULES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("One two three.", [3]),
        ("First sentence here. Second `a b c` one, Eq. 3.", [3, 5]),
        ("a bound: nats per token, 0.5 ± 0.1", [2, 5]),
    ],
)
def test_sentences_are_counted(text, words):
    assert [length(sentence) for sentence in sentences(text)] == words


if __name__ == "__main__":
    for rule in sys.argv[1:] or RULES:
        places = list(RULES[rule]())
        print(f"{rule}: {len(places)}")
        if len(sys.argv) > 1:
            for path, line, remark in places:
                print(f"{path}:{line} {remark}")
