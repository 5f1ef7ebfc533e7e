"""Published evaluation protocols: their chunks, their estimator, and what is biased about them.

They exist so that a number can be set beside a published one. Documents are joined and cut into
chunks of the model's length; what is left over at the end of every 1000 documents is dropped, as in
the published preprocessing. None of their numbers is a bound on the likelihood of the text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data import Loss
from textdiff.errors import ConfigError, DataError, closest
from textdiff.likelihood.windows import Windows, cut_windows

GROUP_DOCUMENTS = 1000

_PACKED = (
    "documents are joined and chunks see across their boundaries; each chunk starts without context"
)
_DROPPED = (
    "text after the last whole chunk of every 1000 documents is dropped (published runs with "
    "several preparation processes drop at other places)"
)
_CUT_OFF = (
    "times are drawn from [0.001, 1] and boundary terms are left out: about 0.1 % low for models "
    "whose schedule leaves 0.001 of the tokens at its end (their prior would be infinite), about "
    "0.03 % high for those whose schedule ends at 0"
)


@dataclass(frozen=True)
class Protocol:
    """One published way to turn documents into chunks and chunks into a number.

    Attributes:
        name: as `--protocol` takes it.
        ends_documents: whether an end-of-text token follows every document.
        frames_chunks: whether each chunk is [BOS] ... [EOS], inside the model's length.
        skips_first: whether a chunk's first token is context that is neither noisy nor counted.
        draws: noise draws per chunk in the published evaluation.
        estimator: name and options of the published estimator.
        data_biases: what is wrong with, or special about, what is scored; in plain words.
        estimator_biases: likewise about the published estimator.
    """

    name: str
    ends_documents: bool
    frames_chunks: bool
    skips_first: bool
    draws: int
    data_biases: tuple[str, ...]
    estimator_biases: tuple[str, ...]
    estimator: str = "time"
    options: Mapping[str, Any] = field(default_factory=lambda: {"eps": 1e-3, "complete": False})

    @property
    def note(self) -> str:
        """What keeps any number of this protocol from being a bound; empty if nothing does."""
        counted = self.ends_documents or self.frames_chunks
        return "special tokens are counted as if they were text" if counted else ""

    def biases(self, estimator: str) -> tuple[str, ...]:
        """What is biased when the chunks are scored by some estimator."""
        published = estimator == self.estimator
        return self.data_biases + (self.estimator_biases if published else ())

    def settings(self, options: Mapping[str, Any], block_size: int | None = None) -> dict[str, Any]:
        """Options of an estimate: those given, on top of the published estimator's.

        An estimator that is named replaces the published one with all its options. Blocks of one
        token (autoregressive models) are published without noise: every token masked, no error.
        """
        if options.get("estimator") is not None:
            return dict(options)
        given = {key: value for key, value in options.items() if value is not None}
        if block_size == 1:
            return {"estimator": "masked_count", **given}
        return {"estimator": self.estimator, **self.options, **given}


PROTOCOLS = {
    "sedd": Protocol(
        name="sedd",
        ends_documents=True,
        frames_chunks=False,
        skips_first=False,
        draws=1000,
        data_biases=(
            "the end-of-text tokens between documents are counted as text",
            _PACKED,
            _DROPPED,
        ),
        estimator_biases=(
            _CUT_OFF,
            "the paper adds a prior term of about 0.011 nats/token at 50k ids, its code does not",
        ),
    ),
    "mdlm": Protocol(
        name="mdlm",
        ends_documents=True,
        frames_chunks=True,
        skips_first=False,
        draws=1,
        data_biases=(
            "[BOS] and [EOS] stand at fixed places of every chunk and count as 2 of its tokens; a "
            "model trained on such chunks pays nearly nothing for them (low), others a lot (high)",
            "the end-of-text tokens between documents are counted as text; the published code adds "
            "them, the published zero-shot figures are said to be without",
            _PACKED,
            _DROPPED,
        ),
        estimator_biases=(_CUT_OFF,),
    ),
    "bd3lm": Protocol(
        name="bd3lm",
        ends_documents=False,
        frames_chunks=False,
        skips_first=True,
        draws=1,
        data_biases=(
            "the first token of every chunk is given and neither scored nor counted",
            _PACKED,
            _DROPPED,
        ),
        estimator_biases=(
            _CUT_OFF,
            "published times are tied to the place of a block in its batch, which biases early and "
            "late blocks at small batches; here they are permuted",
        ),
    ),
}
"""Published protocols by name."""


def find_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {name!r}; {closest(name, [*PROTOCOLS, 'none'])}")
    return PROTOCOLS[name]


def published_windows(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[NDArray[np.int32]],
    texts: Sequence[str],
    length: int,
    clean: Tensor,
    losses: Mapping[int, Loss] | None = None,
) -> Windows:
    """Packs documents into chunks as a protocol does; every chunk counts as one document.

    A document's bytes are shared out among the chunks that hold its tokens.

    Args:
        protocol: the protocol.
        tokenizer: knows the special tokens.
        documents: token ids of each document, without special tokens.
        texts: the same documents as text.
        length: the model's sequence length in tokens.
        clean: [V] bool, ids that the model can predict.
        losses: by document, what its tokens do not give back.

    Raises:
        ConfigError: a special token that the protocol inserts is unknown or cannot be predicted.
        DataError: fewer tokens than one chunk, or tokens that the model cannot predict.
    """
    cut_windows(documents, texts, length, clean)  # refuses tokens outside the vocabulary
    first, last = _specials(protocol, tokenizer, clean)
    room = length - 2 * protocol.frames_chunks
    chunks: list[NDArray[np.int64]] = []
    sizes: list[float] = []
    lost: dict[int, Loss] = {}
    for ids, weights, owners in _groups(protocol, documents, texts, last):
        for start in range(0, len(ids) - room + 1, room):
            body = ids[start : start + room]
            held = np.unique(owners[start : start + room]).tolist()
            lost |= {len(chunks): (losses or {})[d] for d in held if d in (losses or {})}
            chunks.append(
                np.concatenate([[first], body, [last]]) if protocol.frames_chunks else body
            )
            sizes.append(float(weights[start + protocol.skips_first : start + room].sum()))
    if not chunks:
        raise DataError(
            f"protocol {protocol.name} scores whole chunks of {length} tokens, and the text has "
            f"{sum(map(len, documents))} tokens; give more text or --protocol none"
        )
    scored = np.ones(length, dtype=bool)
    scored[0] = not protocol.skips_first
    return Windows(
        chunks,
        torch.arange(len(chunks)),
        torch.zeros(len(chunks), dtype=torch.int64),
        torch.full((len(chunks),), int(scored.sum())),
        torch.tensor(sizes, dtype=torch.float64).round().long(),
        [scored] * len(chunks) if protocol.skips_first else None,
        losses=lost,
    )


def _groups(
    protocol: Protocol,
    documents: Sequence[NDArray[np.int32]],
    texts: Sequence[str],
    end: int,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]]:
    """Tokens of every 1000 documents in a row, the bytes that each stands for, its document."""
    tail = np.array([end] if protocol.ends_documents else [], dtype=np.int64)
    for start in range(0, len(documents), GROUP_DOCUMENTS):
        group = range(start, min(start + GROUP_DOCUMENTS, len(documents)))
        ids = [part for d in group for part in (documents[d].astype(np.int64), tail)]
        weights = [
            np.r_[
                np.full(len(documents[d]), len(texts[d].encode()) / max(1, len(documents[d]))),
                0 * tail,
            ]
            for d in group
        ]
        owners = np.repeat(group, [len(documents[d]) + len(tail) for d in group])
        yield np.concatenate(ids), np.concatenate(weights), owners


def _specials(
    protocol: Protocol, tokenizer: PreTrainedTokenizerFast, clean: Tensor
) -> tuple[int, int]:
    """Ids of [BOS] and [EOS]; tokenizers without a beginning use their end, as GPT-2's does."""
    last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    first = last if first is None else first
    needed = [last] * (protocol.ends_documents or protocol.frames_chunks)
    needed += [first] * protocol.frames_chunks
    for token_id in needed:
        if token_id is None:
            raise ConfigError(
                f"protocol {protocol.name} inserts end-of-text tokens, and the tokenizer has none"
            )
        if not bool(clean[token_id]):
            raise ConfigError(
                f"protocol {protocol.name} inserts {tokenizer.convert_ids_to_tokens(token_id)}, "
                "which this model cannot predict; use protocol none or bd3lm"
            )
    return (first, last) if needed else (-1, -1)
