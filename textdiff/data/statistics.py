"""What a prepared corpus looks like: sizes, document lengths, and how the tokenizer cuts it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from textdiff.data.corpus import Corpus

_SHOWN_TOKENS = 48


@dataclass(frozen=True)
class Histogram:
    """Training documents by their length.

    Attributes:
        edges: lengths in tokens; bin i holds the lengths edges[i] <= n < edges[i + 1].
        counts: documents per bin.
        median: of the lengths.
        longest: of the lengths.
    """

    edges: list[int]
    counts: list[int]
    median: float
    longest: int


def source_statistics(corpus: Corpus) -> list[dict[str, Any]]:
    """The record of every source with `bytes_per_token`, end-of-text tokens not counted."""
    ends = corpus.tokenizer.eos_token_id is not None
    found = []
    for source in corpus.record["sources"]:
        tokens = source["train_tokens"] - (source["train_documents"] if ends else 0)
        ratio = source["train_bytes"] / tokens if tokens else None
        found.append({**source, "bytes_per_token": ratio})
    return found


def length_histogram(corpus: Corpus) -> Histogram:
    """Lengths of the training documents, end-of-text tokens included, in powers of two."""
    lengths = np.concatenate([stream.document_lengths for stream in corpus.streams])
    low = int(np.log2(max(1, lengths.min())))
    high = int(np.log2(max(1, lengths.max()))) + 1
    edges = [2**power for power in range(low, high + 1)]
    edges[0] = min(edges[0], int(lengths.min()))
    counts, _ = np.histogram(lengths, [*edges[:-1], edges[-1] + 1])
    return Histogram(edges, counts.tolist(), float(np.median(lengths)), int(lengths.max()))


def examples(corpus: Corpus, number: int) -> list[list[str]]:
    """The beginnings of training documents from all over the corpus, as lists of token texts."""
    found = []
    for stream in corpus.streams:
        lengths = stream.document_lengths
        starts = np.cumsum(lengths) - lengths
        step = max(1, len(starts) // number)
        for row in range(0, len(starts), step)[:number]:
            start = int(starts[row])
            ids = stream.read(start, start + min(int(lengths[row]), _SHOWN_TOKENS))
            found.append(token_texts(corpus.tokenizer, ids.tolist()))
    return found


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """What every token adds to the decoded text; joined they are that text.

    Tokens that end inside a character add nothing: the one that completes it adds it whole, and
    what the last token leaves incomplete is left out.
    """
    texts: list[str] = []
    before = ""
    for stop in range(1, len(ids) + 1):
        after = str(tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False))
        whole = after.rstrip("\ufffd")
        texts.append(whole[len(before) :])
        before = whole if len(whole) > len(before) else before
    return texts
