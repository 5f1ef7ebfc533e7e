"""Text of tokenised benchmark corpora put back into the shape of running text.

Published zero-shot perplexities are of detokenised text: the benchmarks store words and punctuation
apart by spaces, which no language model of running text was trained on. Each detokeniser is an
ordered table of substitutions. They lose information (`<unk>`, the position of quotes).
Perplexities per token are therefore comparable only under the same detokeniser, and bits per byte
only with the bytes of the detokenised text.
"""

import re
from collections.abc import Callable

from textdiff.errors import unknown

Replacement = str | Callable[[re.Match[str]], str]
Rules = tuple[tuple[re.Pattern[str], Replacement], ...]


def _rules(*pairs: tuple[str, Replacement]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# Penn Treebank as Mikolov distributes it: numbers are N, rare words <unk>, contractions split.
_PTB = _rules(
    (r" 's", "'s"),
    (r"s ' ", "s' "),
    (r" n't", "n't"),
    (r" \n ", "\n"),
    (r"\\/", "/"),
    (r"(?<= )N(?= )", "1"),
    (r"([$#]) 1", r"\g<1>1"),
    (r"<unk>", "?"),
)

# WikiText: Moses tokens, with @-marked separators inside numbers and words.
_WIKITEXT = _rules(
    (r"s '", "s'"),
    (r" @([-,.])@ ", r"\1"),
    (r" ([:;.!?,]) ", r"\1 "),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    # Joins what is between any two apostrophes: a flaw, and the published texts have it.
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"=(?: =)+", lambda match: match.group().replace(" ", "")),
    (r" ° ", "°"),
    (r" ?\n ?", "\n"),
    (r"(?<= )N(?= )", "1"),
    (r" 's", "'s"),
)

# One Billion Words: one sentence a line, every punctuation mark a word of its own.
_LM1B = _rules(
    (r"(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \.( |$)", r" \1.\2"),
    (r" ([?!])(?: |$)", r"\1 "),
    (r" ([,:;]) ", r"\1 "),
    (r" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"),
)

_LAMBADA = _rules((r"[“”]", '"'))


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def ptb(text: str) -> str:
    """Detokenise Penn Treebank: contractions joined, `N` as 1, `<unk>` as a question mark."""
    return _apply(_PTB, text)


def wikitext(text: str) -> str:
    """Detokenise WikiText: `@-@` resolved, spaces around punctuation and headings removed."""
    return _apply(_WIKITEXT, text)


def lm1b(text: str) -> str:
    """Detokenise One Billion Words: spaces before punctuation and inside quotes removed."""
    return _apply(_LM1B, text).rstrip(" ")


def lambada(text: str) -> str:
    """Detokenise Lambada: straight quotation marks, and GPT-2's newline before the passage."""
    return "\n" + _apply(_LAMBADA, text).strip()


def scientific_papers(text: str) -> str:
    """Detokenise PubMed and arXiv articles: WikiText's rules, then those of One Billion Words."""
    return lm1b(wikitext(text))


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "ptb": ptb,
    "wikitext": wikitext,
    "lm1b": lm1b,
    "lambada": lambada,
    "scientific_papers": scientific_papers,
}
"""Detokenisers by the names that `--detokenizer` and evaluation suites use."""


def detokenizer(name: str) -> Callable[[str], str]:
    """Return the detokeniser of a name.

    Raises:
        ConfigError: no detokeniser has that name.
    """
    if name not in DETOKENIZERS:
        raise unknown("detokenizer", name, DETOKENIZERS)
    return DETOKENIZERS[name]
