"""Published evaluation protocols: their chunks, their estimator, and what is biased about them.

They exist so that a number can be set beside a published one. Documents are joined and cut into
chunks of the model's length. What is left over at the end of every 1000 documents is dropped, as in
the published preprocessing. None of their numbers is a bound on the likelihood of the text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data.losses import Loss
from textdiff.diffusion.objectives import Objective
from textdiff.errors import ConfigError, DataError, unknown
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
        own_biases: special properties of what is scored, in plain words.
        ends_documents: whether an end-of-text token follows every document.
        frames_chunks: whether each chunk is [BOS] ... [EOS], inside the model's length.
        skips_first: whether a chunk's first token is context that is neither noisy nor counted.
        draws: noise draws per chunk in the published evaluation.
        estimator: name and options of the published estimator.
        estimator_biases: special properties of the published estimator.
    """

    name: str
    own_biases: tuple[str, ...]
    ends_documents: bool = False
    frames_chunks: bool = False
    skips_first: bool = False
    draws: int = 1
    estimator: str = "time"
    options: Mapping[str, Any] = field(default_factory=lambda: {"eps": 1e-3, "complete": False})
    estimator_biases: tuple[str, ...] = ()

    def read_by(self, objective: Objective) -> "Protocol":
        """Return the protocol as it is for models of an objective.

        The official code of left-to-right baselines never scores the first token of a chunk.
        """
        if not objective.has_own_start:
            return self
        reason = "the first token of every chunk is context, as in the official left-to-right code"
        return replace(self, skips_first=True, own_biases=(*self.own_biases, reason))

    @property
    def note(self) -> str:
        """Reason why no number of this protocol is a bound; empty if there is none."""
        counted = self.ends_documents or self.frames_chunks
        return "special tokens are counted as if they were text" if counted else ""

    def biases(self, estimator: str) -> tuple[str, ...]:
        """Return what is biased when the chunks are scored by some estimator."""
        published = (_CUT_OFF, *self.estimator_biases) if estimator == self.estimator else ()
        return (*self.own_biases, _PACKED, _DROPPED, *published)

    def settings(self, options: Mapping[str, Any], block_size: int | None = None) -> dict[str, Any]:
        """Return the options of an estimate: those given, on top of the published estimator's.

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
        "sedd",
        ("the end-of-text tokens between documents are counted as text",),
        ends_documents=True,
        draws=1000,
        estimator_biases=(
            "the paper adds a prior term of about 0.011 nats/token at 50k ids, its code does not",
        ),
    ),
    "mdlm": Protocol(
        "mdlm",
        (
            "[BOS] and [EOS] stand at fixed places of every chunk and count as 2 of its tokens; a "
            "model trained on such chunks finds them nearly certain (low), others do not (high)",
            "the end-of-text tokens between documents are counted as text; the published code adds "
            "them, the published zero-shot figures are reported without",
        ),
        ends_documents=True,
        frames_chunks=True,
    ),
    "bd3lm": Protocol(
        "bd3lm",
        ("the first token of every chunk is fixed and neither scored nor counted",),
        skips_first=True,
        estimator_biases=(
            "published times are tied to the place of a block in its batch, which biases early and "
            "late blocks at small batches; here they are permuted",
        ),
    ),
}
"""Published protocols by name."""


def find_protocol(name: str) -> Protocol:
    """Return the protocol of a name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, [*PROTOCOLS, "none"])
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
    """Pack documents into chunks, each a document with its share of the documents' bytes.

    Args:
        protocol: the protocol.
        tokenizer: has the special tokens.
        documents: token ids of each document, without special tokens.
        texts: the same documents as text.
        length: the model's sequence length.
        clean: [V] bool, ids that the model can predict.
        losses: by document, text that its tokens do not give back.

    Raises:
        ConfigError: a special token that the protocol inserts is unknown or cannot be predicted.
        DataError: fewer tokens than one chunk, or tokens that the model cannot predict.
    """
    cut_windows(documents, texts, length, clean)  # refuses tokens outside the vocabulary
    first, last = _specials(protocol, tokenizer, clean)
    chunks = _chunks(protocol, documents, texts, length, last)
    lost = losses or {}
    before, after = ([first], [last]) if protocol.frames_chunks else ([], [])
    scored = np.arange(length) >= protocol.skips_first
    return Windows(
        [np.concatenate([before, body, after]).astype(np.int64) for body, _, _ in chunks],
        torch.arange(len(chunks)),
        torch.zeros(len(chunks), dtype=torch.int64),
        torch.full((len(chunks),), int(scored.sum())),
        torch.tensor([size for _, size, _ in chunks], dtype=torch.float64).round().long(),
        [scored] * len(chunks) if protocol.skips_first else None,
        losses={n: lost[d] for n, (_, _, own) in enumerate(chunks) for d in own if d in lost},
    )


def _chunks(
    protocol: Protocol,
    documents: Sequence[NDArray[np.int32]],
    texts: Sequence[str],
    length: int,
    end: int,
) -> list[tuple[NDArray[np.int64], float, list[int]]]:
    """Return the tokens between each chunk's frame, their bytes, and their documents."""
    room, chunks = length - 2 * protocol.frames_chunks, []
    for ids, weights, owners in _groups(protocol, documents, texts, end):
        for start in range(0, len(ids) - room + 1, room):
            stop = start + room
            size = float(weights[start + protocol.skips_first : stop].sum())
            chunks.append((ids[start:stop], size, np.unique(owners[start:stop]).tolist()))
    if not chunks:
        raise DataError(
            f"protocol {protocol.name} scores whole chunks of {length} tokens, and the text has "
            f"{sum(map(len, documents))} tokens; give more text or --protocol none",
            code="less_than_a_chunk",
        )
    return chunks


def _groups(
    protocol: Protocol,
    documents: Sequence[NDArray[np.int32]],
    texts: Sequence[str],
    end: int,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]]:
    """Yield tokens of every 1000 documents, the bytes each stands for, and its document."""
    tail = np.array([end] if protocol.ends_documents else [], dtype=np.int64)
    for start in range(0, len(documents), GROUP_DOCUMENTS):
        group = range(start, min(start + GROUP_DOCUMENTS, len(documents)))
        ids = [piece for d in group for piece in (documents[d].astype(np.int64), tail)]
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
    """Return the ids of [BOS] and [EOS]; tokenizers without a beginning use their end (GPT-2)."""
    last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    first = last if first is None else first
    needed = [last] * (protocol.ends_documents or protocol.frames_chunks)
    needed += [first] * protocol.frames_chunks
    for token_id in needed:
        if token_id is None:
            raise ConfigError(
                f"protocol {protocol.name} inserts end-of-text tokens, and the tokenizer has none",
                code="no_end_of_text_token",
            )
        if not bool(clean[token_id]):
            raise ConfigError(
                f"protocol {protocol.name} inserts {tokenizer.convert_ids_to_tokens(token_id)}, "
                "which this model cannot predict; use protocol none or bd3lm",
                code="special_token_not_predicted",
            )
    return (first, last) if needed else (-1, -1)
