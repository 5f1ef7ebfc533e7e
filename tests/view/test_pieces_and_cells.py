"""Tokens as strings, cells and lines of the screen."""

import pytest
from rich.cells import cell_len

from textdiff.data.sections import BpeTokenizer, ByteTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.view.cells import BREAK_TEXT, END, OPEN_TEXT, Kind, Pieces, Reader, visible
from textdiff.view.live import lay_out, visible_lines

WORDS = "Ein schöner Tag, 今日は良い日です, naïve 👩‍🚀 crew.\n\tIndented; done.\n" * 4


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request):
    section = ByteTokenizer() if request.param == "byte" else BpeTokenizer(vocab_size=300)
    return train_tokenizer(section, [WORDS])


def pieces_of(tokenizer) -> Pieces:
    return Pieces(tokenizer, [tokenizer.mask_token_id])


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_pieces_together_are_the_text(tokenizer):
    ids = encode(tokenizer, WORDS)
    shown = pieces_of(tokenizer)(ids)
    assert "".join(shown) == WORDS
    assert len(shown) == len(ids)
    assert "\ufffd" not in "".join(shown)


def test_a_mask_splits_no_other_character(tokenizer):
    """Whatever is masked, what is left decodes as far as it can: whole characters stay whole."""
    ids = encode(tokenizer, WORDS)
    whole = pieces_of(tokenizer)(ids)
    for gap in range(0, len(ids), 5):
        holed = [*ids[:gap], tokenizer.mask_token_id, *ids[gap + 1 :]]
        shown = pieces_of(tokenizer)(holed)
        assert shown[gap] == ""
        far = [at for at in range(len(ids)) if abs(at - gap) > 8]
        assert [shown[at] for at in far] == [whole[at] for at in far]


def test_bytes_that_are_no_character_do_not_hold_up_the_rest():
    tokenizer = train_tokenizer(ByteTokenizer(), [])
    ids = [0x80] * 9 + list(b"abc")
    shown = pieces_of(tokenizer)(ids)
    assert shown[-3:] == ["a", "b", "c"]
    assert shown[0] == "\ufffd"
    assert "".join(shown).count("\ufffd") == 9


def test_ends_are_shown_and_what_follows_is_cut(tokenizer):
    mask, end = tokenizer.mask_token_id, tokenizer.eos_token_id
    reader = Reader(pieces_of(tokenizer), mask, end)
    a, b = (encode(tokenizer, letter)[0] for letter in "ab")
    cells = reader.cells([end, a, mask, end, b], [end, a, b, end, b], {0}, {1}, {2})
    assert [cell.kind for cell in cells] == [
        Kind.GIVEN,  # an end in the prompt ends nothing
        Kind.FRESH,
        Kind.LOST,
        Kind.KEPT,
        Kind.CUT,
    ]
    assert [cell.text for cell in cells] == [END, "a", "b", END, "b"]
    bare = reader.cells([a, mask], None, (), (), ())
    assert [cell.text for cell in bare] == ["a", OPEN_TEXT]
    newline = encode(tokenizer, "\n")[0]
    drafted = reader.cells([mask, newline], [newline, newline], (), (), ())
    assert [cell.text for cell in drafted] == [BREAK_TEXT, "\n"]


def test_nothing_steers_the_terminal():
    steering = "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066]))
    shown = visible(f"a{steering}b")
    assert not any(ord(c) < 32 and c != "\n" for c in shown)
    assert "\x1b" not in shown
    assert not set(shown) & set(map(chr, [*range(0x7F, 0xA0), 0x202E, 0x2066]))


@pytest.mark.parametrize("width", [3, 7, 20])
def test_lines_fit_and_lose_nothing(tokenizer, width):
    reader = Reader(pieces_of(tokenizer), tokenizer.mask_token_id, tokenizer.eos_token_id)
    cells = reader.cells(encode(tokenizer, WORDS), None, (), (), ())
    lines = lay_out(cells, width)
    text = ["".join(part[0] for part in line.parts) for line in lines]
    assert all(cell_len(line) <= width for line in text)
    assert "".join(text) == "".join(cell.text for cell in cells).replace("\n", "")
    positions = [position for line in lines for _, _, position in line.parts]
    assert positions == sorted(positions)


def test_words_are_broken_only_where_they_are_too_long(tokenizer):
    reader = Reader(pieces_of(tokenizer), tokenizer.mask_token_id, None)
    cells = reader.cells(encode(tokenizer, "one two three overlongword x"), None, (), (), ())
    lines = ["".join(part[0] for part in line.parts) for line in lay_out(cells, 8)]
    assert lines == ["one two ", "three ", "overlong", "word x"]


def test_the_screen_follows_what_is_written(tokenizer):
    reader = Reader(pieces_of(tokenizer), tokenizer.mask_token_id, None)
    cells = reader.cells(encode(tokenizer, "\n".join(map(str, range(30)))), None, (), (), ())
    lines = lay_out(cells, 10)
    for busy in range(0, len(cells), 3):
        shown = visible_lines(lines, 5, busy)
        assert len(shown) == 5
        assert any(part[2] >= busy for line in shown for part in line.parts)
        assert shown[0].parts[0][2] <= busy or busy == 0
    assert visible_lines(lines, 5, len(cells) + 9) == lines[-5:]
    assert visible_lines(lines[:4], 5, 0) == lines[:4]
