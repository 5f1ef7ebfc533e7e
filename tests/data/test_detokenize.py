"""Detokenisers: what each corpus's spelling becomes."""

import pytest
from refusals import refused

from textdiff.data.detokenize import DETOKENIZERS, detokenizer
from textdiff.errors import ConfigError

CASES = [
    ("ptb", "mr. <unk> 's plan is n't new", "mr. ?'s plan isn't new"),
    ("ptb", "N N shares at $ N each \n owners ' view", "N 1 shares at $1 each\nowners' view"),
    ("ptb", "and\\/or", "and/or"),
    ("wikitext", "a 12 @,@ 000 @.@ 5 kg half @-@ track", "a 12,000.5 kg half-track"),
    ("wikitext", "a \n = = = Cast = = = \n b", "a\n=== Cast ===\nb"),
    ("wikitext", 'It was , he said , " good " . ', 'It was, he said, "good". '),
    ("wikitext", "the dogs ' owner ( second ) [ sic ] { x }", "the dogs' owner (second) [sic] {x}"),
    ("wikitext", "at 30 ° N", "at 30°N"),
    ("wikitext", "the owner 's cat", "the owner's cat"),
    ("lm1b", "He said : it 's over , is n't it ?", "He said: it's over, is n't it?"),
    ("lm1b", 'She ( the head ) said " no way " for $ 5 .', 'She (the head) said "no way" for $5.'),
    ("lm1b", "http : / / a.b / c", "http://a.b/c"),
    ("lambada", " “Yes,” he said. ", '\n"Yes," he said.'),
    ("none", " as it was ", " as it was "),
]


@pytest.mark.parametrize(("name", "given", "expected"), CASES)
def test_examples(name, given, expected):
    assert detokenizer(name)(given) == expected


@pytest.mark.parametrize("name", sorted(DETOKENIZERS))
def test_running_text_keeps_its_words(name):
    text = "Running text, as people write it (mostly), isn't changed: it's fine."
    assert detokenizer(name)(text).split() == text.split()


def test_unknown_name():
    with refused(ConfigError, "unknown_detokenizer", "'wikitext'"):
        detokenizer("wikitxt")
