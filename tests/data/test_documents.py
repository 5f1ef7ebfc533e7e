import random

import pytest
from refusals import refused

from textdiff.data.document_stream import (
    Documents,
    TextBlock,
    cut_blocks,
    from_texts,
    iterate_texts,
    join,
    section,
    split_long,
)
from textdiff.errors import DataError


def blocks(text: str, rng: random.Random) -> list[TextBlock]:
    """A document in blocks of random lengths."""
    edges = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(4)))
    parts = [text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True)]
    return [TextBlock(part, False) for part in parts[:-1]] + [TextBlock(parts[-1], True)]


@pytest.mark.parametrize("seed", range(200))
def test_pieces_of_blocks_are_those_of_the_whole(seed: int):
    rng = random.Random(seed)
    texts = ["".join(rng.choices("ab\n", [9, 9, 2], k=rng.randrange(60))) for _ in range(5)]
    limit = rng.randrange(1, 12)
    cut = list(cut_blocks((b for text in texts for b in blocks(text, rng)), limit))
    wanted = [piece for text in texts for piece in split_long(text, limit)]
    assert [piece.text for piece in cut] == wanted
    assert sum(piece.last for piece in cut) == len(texts)
    joined = Documents(lambda: iter(cut), "")
    assert list(iterate_texts(joined)) == texts


def test_joined_corpora_follow_each_other():
    first, second = from_texts(["a", "b"]), from_texts(["c"])
    assert list(iterate_texts(join([first, second]))) == ["a", "b", "c"]
    assert join([first, second]).signature != join([second, first]).signature


@pytest.mark.parametrize(
    ("skip", "limit", "kept"), [(0, 2, "ab"), (3, None, "de"), (1, 2, "bc"), (4, 9, "e")]
)
def test_section(skip: int, limit: int | None, kept: str):
    whole = Documents(
        lambda: (TextBlock(c, last) for c in "abcde" for last in (False, True)), "signature"
    )
    part = section(whole, skip, limit)
    assert list(iterate_texts(part)) == [c + c for c in kept]
    assert part.signature != whole.signature


def test_section_beyond_the_end():
    with refused(DataError, "no_documents", "5", "2"):
        list(section(from_texts(["a", "b"]), 5, None).blocks())


def test_section_reads_no_further_than_it_must():
    def endless():
        while True:
            yield TextBlock("x", True)

    assert len(list(section(Documents(endless, ""), 3, 4).blocks())) == 4
