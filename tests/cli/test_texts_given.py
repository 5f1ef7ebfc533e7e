"""Texts that Python callers hand over: strings in any iterable, and a sentence about all else."""

from pathlib import Path

import pytest
from refusals import refused

from textdiff.errors import ConfigError, DataError
from textdiff.pipeline import TextDiffusion

NOT_TEXTS = [5, None, b"x", {"text": "x"}, [1], [None], [b"x"], ["a", 2], [["a"]], [Path("a.txt")]]


@pytest.fixture(scope="module")
def held(exports) -> TextDiffusion:
    return TextDiffusion.from_pretrained(exports / "a", device="cpu")


@pytest.mark.parametrize("texts", NOT_TEXTS, ids=repr)
def test_scoring_refuses_what_is_not_text(held, texts):
    for score in (
        held.score,
        held.estimate,
        held.windows,
        lambda texts: held.compare(held, texts),
    ):
        with refused(ConfigError, "not_texts", "texts"):
            score(texts)
    if texts is not None:  # not given
        with refused(ConfigError, "not_texts", "prompts"):
            held.score(["a"], prompts=texts)


@pytest.mark.parametrize("texts", NOT_TEXTS, ids=repr)
@pytest.mark.parametrize("option", ["prompts", "suffix", "stop", "ban", "force"])
def test_generation_refuses_what_is_not_text(held, option, texts):
    if texts is None and option != "prompts":  # not given
        return
    with pytest.raises(ConfigError, match=rf"^{option}(\[[01]\])? "):
        held.generate(**{"prompts": "a", option: texts}, max_new_tokens=2, steps=1)


def test_message_says_which_one_and_what_to_do(held):
    for texts, said in (
        (["a", 2], "texts[1] is of type int, not a string"),
        ([b"a"], "texts[0] is of type bytes, not a string; decode it"),
        ([Path("a")], "texts[0] is of type PosixPath, not a string; read the file first"),
        (None, "texts is None; give a list of strings"),
    ):
        with pytest.raises(ConfigError) as caught:
            held.score(texts)
        assert str(caught.value) == said
    with refused(ConfigError, "string_type", "regex 3: give a text"):
        held.generate("a", regex=3)
    with refused(ConfigError, "not_texts", "prompts"):
        held.score(["a", "b"], prompts="ab")


def test_nothing_given_is_nothing_done_or_a_sentence(held):
    assert held.score([]) == []
    assert held.generate([], max_new_tokens=2).texts == []
    for empty in (held.estimate, held.windows, lambda texts: held.compare(held, texts)):
        with refused(DataError, "no_texts", "no text given"):
            empty([])
    with refused(DataError, "no_token_to_score", "no token to score"):
        held.score([""])


def test_any_iterable_of_strings_will_do(held):
    texts = ["the cat", "a dog"]
    expected = [bound.mean for bound in held.score(texts)]
    for given in (tuple(texts), iter(texts), (text for text in texts), dict.fromkeys(texts).keys()):
        assert [bound.mean for bound in held.score(given)] == expected
    options = {"max_new_tokens": 2, "steps": 1}
    assert held.generate(iter(texts), **options) == held.generate(texts, **options)
    plain = held.generate("a", **options)
    assert held.generate("a", suffix=None, stop=None, ban=None, **options) == plain
