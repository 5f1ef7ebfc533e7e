"""Figures of a prepared corpus, and a check: sizes, document lengths, how it is cut into tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from textdiff.data.split import Scan
from textdiff.data.token_stream import TokenStream
from textdiff.data.tokenizer import excluded_ids, vocabulary_size
from textdiff.errors import DataError

if TYPE_CHECKING:
    from textdiff.data.corpus import Corpus

_SHOWN_TOKENS = 48
_CHECKED_TOKENS = 1 << 24  # tokens that are checked together


def refuse_excluded(
    names: Sequence[str],
    scans: Sequence[Scan],
    trained: NDArray[np.bool_],
    streams: Sequence[TokenStream],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Look for tokens that the model gives no probability: their loss would be infinite.

    Args:
        names: of the sources.
        scans: of the sources, D documents in all.
        trained: bool [D], which have a part that trains.
        streams: the tokens.
        tokenizer: the tokenizer that made them.

    Raises:
        DataError: there is one, with its document.
    """
    excluded = np.zeros(vocabulary_size(tokenizer), bool)  # [V]
    excluded[list(excluded_ids(tokenizer))] = True
    before = 0  # training documents of the streams before
    for stream in streams:
        for start in range(0, len(stream), _CHECKED_TOKENS):
            tokens = stream.read(start, min(start + _CHECKED_TOKENS, len(stream)))
            wrong = np.flatnonzero(excluded[tokens])
            if wrong.size:
                at, token = start + int(wrong[0]), int(tokens[wrong[0]])
                row = np.flatnonzero(trained)[before + int(stream.documents(at, at + 1)[0])]
                ends = np.cumsum([len(scan.digests) for scan in scans])
                source = int(np.searchsorted(ends, row, side="right"))
                number = row - ends[source] + len(scans[source].digests) + 1
                raise DataError(
                    f"document {number} of {names[source]} has the token "
                    f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token}), which no model may "
                    "predict: its text has characters that are unknown to the tokenizer; remove "
                    "them, or choose a byte or bpe tokenizer",
                    code="excluded_token",
                )
        before += stream.num_documents


def source_facts(
    scans: Sequence[Scan],
    trained: NDArray[np.bool_],
    held_out: NDArray[np.bool_],
    streams: Sequence[TokenStream],
    validation: Sequence[str],
) -> list[dict[str, Any]]:
    """Return documents, characters, bytes and hash of every source, and what of them trains.

    Args:
        scans: of the sources, D documents in all.
        trained: bool [D], which have a part that trains.
        held_out: bool [D], which have a part that is held out.
        streams: the tokens.
        validation: the held-out texts.
    """
    tokens, held_bytes = np.zeros(len(trained), np.int64), np.zeros(len(trained), np.int64)  # [D]
    tokens[trained] = np.concatenate([stream.document_lengths for stream in streams])
    held_bytes[held_out] = [len(text.encode()) for text in validation]
    edges = np.cumsum([len(scan.digests) for scan in scans])[:-1]
    split = zip(scans, *(np.split(x, edges) for x in (trained, tokens, held_bytes)), strict=True)
    return [
        {
            "documents": len(scan.digests),
            "characters": int(scan.characters.sum()),
            "bytes": int(scan.utf8.sum()),
            "sha256": scan.fingerprint,
            "train_documents": int(rows.sum()),
            "train_bytes": int(scan.utf8.sum() - held.sum()),
            "train_tokens": int(counts.sum()),
        }
        for scan, rows, counts, held in split
    ]


def source_statistics(corpus: "Corpus") -> list[dict[str, Any]]:
    """Return the record of every source with `bytes_per_token`, end-of-text tokens not counted."""
    ends = corpus.tokenizer.eos_token_id is not None
    records = []
    for source in corpus.record["sources"]:
        tokens = source["train_tokens"] - (source["train_documents"] if ends else 0)
        ratio = source["train_bytes"] / tokens if tokens else None
        records.append({**source, "bytes_per_token": ratio})
    return records


def length_histogram(corpus: "Corpus") -> dict[str, Any]:
    """Count the training documents by length, end-of-text tokens included, in powers of two.

    Returns:
        `edges` in tokens (bin i holds the lengths edges[i] <= n < edges[i + 1]), `counts` of
        documents per bin, and the `median` and `longest` length.
    """
    lengths = np.concatenate([stream.document_lengths for stream in corpus.streams])
    low = int(np.log2(max(1, lengths.min())))
    high = int(np.log2(max(1, lengths.max()))) + 1
    edges = [2**power for power in range(low, high + 1)]
    edges[0] = min(edges[0], int(lengths.min()))
    counts, _ = np.histogram(lengths, [*edges[:-1], edges[-1] + 1])
    return {
        "edges": edges,
        "counts": counts.tolist(),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
    }


def examples(corpus: "Corpus", number: int) -> list[list[str]]:
    """Return beginnings of training documents from all over the corpus, as token texts."""
    beginnings = []
    for stream in corpus.streams:
        lengths = stream.document_lengths
        starts = np.cumsum(lengths) - lengths
        step = max(1, len(starts) // number)
        for row in range(0, len(starts), step)[:number]:
            start = int(starts[row])
            ids = stream.read(start, start + min(int(lengths[row]), _SHOWN_TOKENS))
            beginnings.append(token_texts(corpus.tokenizer, ids.tolist()))
    return beginnings


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """Return what every token adds to the decoded text; joined they are that text.

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
