"""Texts of which only a part is scored."""

import numpy as np
import pytest
import torch

from textdiff.data.sections import ByteTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.errors import DataError
from textdiff.likelihood.scored_texts import prompted, spanned, windows_of


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(ByteTokenizer(), [])


def cut(tokenizer, documents, length=8, stride=None):
    return windows_of(tokenizer, documents, length, torch.ones(300, dtype=torch.bool), stride)


def scored_text(windows) -> str:
    masks = windows.scored or [np.ones(len(ids), bool) for ids in windows.tokens]
    kept = [ids[mask] for ids, mask in zip(windows.tokens, masks, strict=True)]
    return bytes(np.concatenate(kept).tolist()).decode()


def test_prompts(tokenizer):
    windows = cut(tokenizer, prompted(["ab", ""], ["cde", "fg"]))
    assert [bytes(ids.tolist()) for ids in windows.tokens] == [b"abcde", b"fg"]
    assert scored_text(windows) == "cdefg"
    assert windows.document_bytes.tolist() == [3, 2]


def test_spans(tokenizer):
    windows = cut(tokenizer, spanned(["abcdefg", "hij"], [[(1, 3), (5, 6)], []]))
    assert scored_text(windows) == "bcf"
    assert windows.document_tokens.tolist() == [3, 0]


@pytest.mark.parametrize("spans", [[(2, 1)], [(0, 9)], [(-1, 2)], [(2, 4), (1, 3)]])
def test_impossible_spans(spans):
    with pytest.raises(DataError) as error:
        spanned(["abc", "abcde"], [[(0, 1)], spans])
    assert error.value.code == "spans_out_of_order"


def test_lengths_must_agree():
    with pytest.raises(DataError) as error:
        prompted(["a"], ["b", "c"])
    assert error.value.code == "not_one_prompt_each"
    with pytest.raises(DataError) as error:
        spanned(["b", "c"], [[]])
    assert error.value.code == "not_one_list_each"


def test_long_documents_need_a_stride_only_where_something_is_given(tokenizer):
    assert scored_text(cut(tokenizer, [[("abcdefghijkl", True)]])) == "abcdefghijkl"
    long = prompted(["abcdef"], ["ghijkl"])
    with pytest.raises(DataError) as error:
        cut(tokenizer, long)
    assert error.value.code == "context_too_long"
    assert scored_text(cut(tokenizer, long, stride=2)) == "ghijkl"
