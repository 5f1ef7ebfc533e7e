"""Write the index of equations: every citation in `textdiff/`, its symbol, its file and a test.

    python scripts/equation_index.py           # rewrites docs/equations.md between its markers
    python scripts/equation_index.py --check   # exits with 1 where the page is out of date

Docstrings and comments cite papers as "Eq. 7, arXiv:2406.07524"; "Eq. 7 there" or "Eq. 7" alone is
of the paper that the same docstring, or else its module's, has named last. A citation without an
equation is listed where its file has none of that paper. A test belongs to a symbol if it cites the
same equation; or else if it names the symbol, its class, or the `kind` under which users choose it;
or else if it uses anything of the symbol's module. Tests named after the symbol come first.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs/equations.md")
MARKERS = "<!-- equations: written by scripts/equation_index.py -->", "<!-- end of equations -->"

# Papers without a name here are listed by their number alone.
PAPERS = {
    "1509.00519": "Importance-weighted autoencoders",
    "1510.03055": "Distinct n-grams",
    "1606.08415": "GELU",
    "1908.04319": "Unlikelihood training",
    "1909.05858": "CTRL",
    "1910.07467": "RMSNorm",
    "2002.05202": "GLU variants",
    "2102.01454": "MAUVE",
    "2107.03006": "D3PM",
    "2110.02037": "Autoregressive diffusion models",
    "2202.04200": "MaskGIT",
    "2212.09748": "DiT",
    "2305.13245": "Grouped-query attention",
    "2310.16834": "SEDD",
    "2406.03736": "RADD",
    "2406.04329": "MD4",
    "2406.07524": "MDLM",
    "2407.01082": "Min-p sampling",
    "2409.02908": "First-hitting sampler",
    "2412.10193": "UDLM",
    "2502.06768": "Top probability margin",
    "2502.09992": "LLaDA",
    "2502.16982": "Muon at scale",
    "2503.00307": "ReMDM",
    "2503.04482": "GIDD",
    "2503.09573": "BD3-LM",
    "2505.22618": "Fast-dLLM",
    "2505.23061": "DINGO",
    "2505.24857": "Entropy-bounded unmasking",
    "2506.10892": "Duo",
    "2508.15487": "Dream",
    "2509.26328": "Fast-dLLM v2",
    "2602.21185": "Psi-samplers",
}

PAPER = r"arXiv:(?P<paper>\d{4}\.\d{4,5})"
NUMBER = r"(?:[A-Z]|\d+)(?:\.\d+)*\b"
PLACE = (
    r"(?P<place>(?:Eq|Sec|Thm|App|Alg|Prop|Table|Algorithm)\.?\s"
    rf"{NUMBER}(?:(?:,\s|\sand\s|\sto\s){NUMBER})*)"
)
DIRECTORIES = ("exact", "diffusion", "models", "likelihood", "sampling")  # searched first


@dataclass
class Symbol:
    """A class, function or module whose docstring or comments cite something.

    Attributes:
        name: `Class.method`, a function, or the module's name where the module's docstring cites.
        path: file, below the repository's root.
        names: identifiers and words that a test may name, the most telling first.
        neighbours: the same of the module's public classes and functions.
    """

    name: str
    path: Path
    names: list[str]
    neighbours: list[str]

    @property
    def telling(self) -> set[str]:
        """Return words that the name of a test of this symbol may hold."""
        return {self.path.stem, snake(self.name.rpartition(".")[2]).strip("_")}


@dataclass(frozen=True, order=True)
class Row:
    """A line of the index."""

    paper: str
    place: str
    path: Path
    symbol: str
    test: str | None


@dataclass
class TestCase:
    """A test function.

    Attributes:
        label: `file::function`, below `tests/`.
        names: identifiers in it, and in fixtures and helpers of the file that it uses.
        modules: files of textdiff that these identifiers are imported from.
        words: its string constants.
        citations: (paper, place) of its docstring.
    """

    label: str
    names: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    words: set[str] = field(default_factory=set)
    citations: set[tuple[str, str]] = field(default_factory=set)


def snake(name: str) -> str:
    """Return a class's name in lower case with underscores between its words."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def citations(text: str, paper: str = "") -> list[tuple[str, str]]:
    """Return (paper, place) of every citation in a text; places are "" where only a paper is named.

    Args:
        text: a docstring or comment.
        paper: the paper that places without one belong to.
    """
    text = " ".join(text.split())
    rows: list[tuple[str, str]] = []
    waiting: list[str] = []
    previous_end, previous_is_paper = 0, False
    for match in re.finditer(f"{PAPER}|{PLACE}", text):
        between = text[previous_end : match.start()]
        if match["paper"]:
            attached = waiting and re.fullmatch(r",? (of )?", between)
            places = waiting if attached else [""]
            rows += [(paper, place) for place in waiting if not attached]
            paper, waiting = match["paper"], []
            rows += [(paper, place) for place in places]
        elif previous_is_paper and re.fullmatch(r",? \(?", between):
            rows.append((paper, match["place"]))
        else:
            if waiting and not re.fullmatch(r",? ?(and )?", between):  # "Eq. 4 there, or Eq. 5 of"
                rows += [(paper, place) for place in waiting]
                waiting = []
            waiting.append(match["place"])
        previous_end, previous_is_paper = match.end(), bool(match["paper"])
    rows += [(paper, place) for place in waiting]
    placed = {number for number, place in rows if place}
    return list(dict.fromkeys(row for row in rows if row[1] or row[0] not in placed))


def texts_by_symbol(path: Path) -> Iterator[tuple[Symbol, str]]:
    """Yield every docstring and comment of a module with the innermost symbol that holds it."""
    source = path.read_text()
    tree = ast.parse(source)
    neighbours: list[str] = []
    spans: list[tuple[int, int, Symbol]] = [
        (0, 10**9, Symbol(path.stem, path, neighbours, neighbours))
    ]

    def visit(node: ast.AST, prefix: str, outer: list[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                names = [child.name, *kinds(child), snake(child.name), child.name.lower()]
                if not prefix and not child.name.startswith("_"):
                    neighbours.extend(names)
                symbol = Symbol(prefix + child.name, path, [*names, *outer], neighbours)
                spans.append((child.lineno, child.end_lineno or 0, symbol))
                visit(child, f"{prefix}{child.name}.", symbol.names)
            else:
                visit(child, prefix, outer)

    visit(tree, "", [])
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            line = getattr(node, "lineno", 0)
            symbol = next(s for start, _, s in spans if start == line)
            yield symbol, ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            inside = [s for start, end, s in spans if start <= line <= end]
            yield inside[-1], token.string


def kinds(node: ast.AST) -> list[str]:
    """Return the name under which users choose a registered class, from its field `kind`."""
    return [
        statement.value.value
        for statement in getattr(node, "body", [])
        if isinstance(statement, ast.AnnAssign)
        and getattr(statement.target, "id", "") == "kind"
        and isinstance(statement.value, ast.Constant)
    ]


def tests(root: Path) -> list[TestCase]:
    """Return the test functions of the repository, those of `DIRECTORIES` first."""
    paths = sorted(
        (root / "tests").rglob("test_*.py"),
        key=lambda p: (_rank(p.relative_to(root / "tests")), p),
    )
    return [case for path in paths for case in _tests_of(path, root)]


def _rank(path: Path) -> int:
    folder = path.parts[0]
    return DIRECTORIES.index(folder) if folder in DIRECTORIES else len(DIRECTORIES)


def _tests_of(path: Path, root: Path) -> list[TestCase]:
    tree = ast.parse(path.read_text())
    named = {
        node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    } | {
        target.id: node
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    modules = {
        alias.name: f"{(node.module or '').replace('.', '/')}.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    cases = []
    for name, node in named.items():
        if not name.startswith("test_"):
            continue
        case = TestCase(f"{path.relative_to(root / 'tests')}::{name}")
        nodes, seen = [node], {name}
        while nodes:
            for inner in ast.walk(nodes.pop()):
                used = getattr(inner, "id", None) or getattr(inner, "arg", None)
                if used in named and used not in seen:
                    seen.add(used)
                    nodes.append(named[used])
                case.names |= {used or "", getattr(inner, "attr", "")}
                case.modules.add(modules.get(used or "", ""))
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    case.words.add(inner.value)
                    case.citations |= set(citations(inner.value))
        cases.append(case)
    return cases


def test_of(symbol: Symbol, paper: str, place: str, cases: list[TestCase]) -> str | None:
    """Return the test that tells most about a citation, by the order of the module's docstring."""
    module = symbol.path.relative_to(ROOT).as_posix()

    def preference(case: TestCase) -> tuple[int, int] | None:
        if place and (paper, place) in case.citations:
            reason = 0
        elif symbol.path.stem in case.words or any(
            n in case.names or n in case.words for n in symbol.names[:4]
        ):
            reason = 1
        elif any(n in case.names or n in case.words for n in symbol.names):
            reason = 2
        elif module in case.modules or any(name in case.names for name in symbol.neighbours):
            reason = 3
        else:
            return None
        file, function = case.label.split("::")
        file = Path(file).stem
        return reason, -sum((name in file) + (name in function) for name in symbol.telling)

    ranked = [(p, number) for number, case in enumerate(cases) if (p := preference(case))]
    return cases[min(ranked)[1]].label if ranked else None


def rows(root: Path) -> list[Row]:
    """Return the index of a checkout.

    Raises:
        ValueError: a docstring cites an equation of no paper.
    """
    cases = tests(root)
    placed: list[tuple[Symbol, str, str]] = []
    for path in sorted((root / "textdiff").rglob("*.py")):
        paper, here = "", []
        for symbol, text in texts_by_symbol(path):
            for number, place in citations(text, paper):
                if not number:
                    raise ValueError(f"{path}: {symbol.name} cites {place} of no paper")
                here.append((symbol, number, place))
            if symbol.name == path.stem:
                paper = next((number for number, _ in citations(text)), paper)
        with_place = {number for _, number, place in here if place}
        placed += [row for row in here if row[2] or row[1] not in with_place]
    return sorted(
        {
            Row(paper, place, s.path.relative_to(root), s.name, test_of(s, paper, place, cases))
            for s, paper, place in placed
        },
        key=lambda row: (row.paper, row.place, str(row.path), row.symbol),
    )


def table(index: list[Row]) -> str:
    """Return the index in Markdown, a row for each paper, equation and symbol."""
    lines = ["| paper | equation | symbol | file | test |", "|---|---|---|---|---|"]
    for row in index:
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})"
        paper = " ".join(filter(None, [PAPERS.get(row.paper), paper]))
        file, function = (row.test or "::").split("::")
        test = f"[`{function}`](../tests/{file})" if row.test else "none"
        source = f"[`{row.path.relative_to('textdiff')}`](../{row.path})"
        lines.append(f"| {paper} | {row.place or '–'} | `{row.symbol}` | {source} | {test} |")
    return "\n".join(lines)


def page(root: Path) -> str:
    """Return the page with its table made anew."""
    before, _, rest = (root / PAGE).read_text().partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    return f"{before}{MARKERS[0]}\n\n{table(rows(root))}\n\n{MARKERS[1]}{after}"


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    made = page(ROOT)
    if parser.parse_args().check:
        return int(made != (ROOT / PAGE).read_text())
    (ROOT / PAGE).write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
