"""Bounds of texts under one model, as Python users ask for them: `TextDiffusion` inherits these."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.checks import checked_texts, whole_number
from textdiff.data.losses import encode_checked
from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError, DataError
from textdiff.likelihood.answer_windows import answer_windows
from textdiff.likelihood.bound import Bound
from textdiff.likelihood.difference import Difference, compare_models
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.protocols import find_protocol, published_windows
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.scored_texts import Span, scored_pieces, windows_of
from textdiff.likelihood.stopping import MIN_REPLICATES
from textdiff.likelihood.windows import Windows
from textdiff.models import Denoiser
from textdiff.sampling.request import Preparer

COUNTS = ("replicates", "samples", "orders", "timesteps", "batch_tokens")
"""Options of `likelihood.estimate` that are whole numbers."""

SELECTION = ("prompts", "spans", "stride", "end_of_text", "conversations")
"""Options of `TextScorer.windows` that `estimate` passes on."""


def _refuse_more(chooser: str, end_of_text: bool, *options: object) -> None:
    """Refuse options that say what is scored where conversations, or a protocol, do."""
    if end_of_text or any(option is not None for option in options):
        protocol = chooser != "conversations"
        raise ConfigError(
            f"{chooser} {'fixes its' if protocol else 'fix their'} chunks: no prompts, spans, "
            f"stride{' or end_of_text' if protocol else ', end_of_text or protocol'}",
            code="protocol_fixes_chunks" if protocol else "conversations_fix_windows",
        )


def _end_token(tokenizer: PreTrainedTokenizerFast, clean: Tensor) -> int:
    """Return the id of the end-of-text token.

    Args:
        tokenizer: the model's.
        clean: [V] bool, ids that the model can predict.

    Raises:
        ConfigError: there is none, or the model cannot predict it.
    """
    token = tokenizer.eos_token_id
    if token is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token, so the end of a document has no probability; "
            "leave end_of_text (--end-of-text) out",
            code="no_end_of_text_token",
        )
    if token >= len(clean) or not bool(clean[token]):
        raise ConfigError(
            f"this model cannot predict {tokenizer.eos_token}, its tokenizer's end-of-text token; "
            "leave end_of_text (--end-of-text) out",
            code="end_of_text_not_predicted",
        )
    return int(token)


@dataclass
class TextScorer:
    """A network with its tokenizer and family.

    Attributes:
        model: the network.
        tokenizer: its tokenizer.
        family: process, schedule, objective and block size; only tokens of the tokenizer are
            predicted.
    """

    model: Denoiser
    tokenizer: PreTrainedTokenizerFast
    family: Family

    @property
    def context(self) -> int:
        """Tokens that the network reads at once."""
        return self.model.context

    def windows(
        self,
        texts: Sequence[str],
        *,
        prompts: Sequence[str] | None = None,
        spans: Sequence[Sequence[Span]] | None = None,
        stride: int | None = None,
        end_of_text: bool = False,
        conversations: bool = False,
        protocol: str | None = None,
    ) -> Windows:
        """Return the windows that are scored of documents, by default whole ones.

        Args:
            texts: the documents.
            prompts: text that precedes each document and is not scored.
            spans: (start, end) characters of each document that are scored, the rest being fixed.
            stride: tokens from one window to the next where documents are longer than the context;
                the overlap is context. None: the context, no overlap.
            end_of_text: whether -log p of every document's end is a term of its own: the token
                that ends it is scored and not counted.
            conversations: whether texts are conversations as JSON, whose answers are scored.
            protocol: a published protocol's chunks instead (`likelihood.protocols.PROTOCOLS`).

        Raises:
            ConfigError: choices that exclude each other, or a name or number out of range.
            DataError: nothing to score, or characters that the tokenizer was not trained on.
        """
        self.check_whole()
        texts = checked_texts(texts, "texts")
        if not texts:
            raise DataError("no text given; give at least one", code="no_texts")
        prompts = None if prompts is None else checked_texts(prompts, "prompts")
        if conversations:
            _refuse_more("conversations", end_of_text, prompts, spans, stride, protocol)
            return answer_windows(self.tokenizer, texts, self.context, self.family.block_size)
        if protocol is None:
            return self._windows(texts, prompts, spans, stride, end_of_text)
        _refuse_more(f"protocol {protocol}", end_of_text, prompts, spans, stride)
        return self._published_windows(texts, protocol)

    def _windows(
        self,
        texts: list[str],
        prompts: list[str] | None,
        spans: Sequence[Sequence[Span]] | None,
        stride: int | None,
        end_of_text: bool,
    ) -> Windows:
        stride = None if stride is None else whole_number("stride", stride)
        pieces = scored_pieces(texts, prompts, spans)
        if end_of_text and spans is not None:
            raise ConfigError(
                "spans are scored conditional on how their text ends: no end_of_text",
                code="spans_and_end_of_text",
            )
        clean = self.family.process.vocabulary.clean.cpu()  # [V]
        end = _end_token(self.tokenizer, clean) if end_of_text else None
        return windows_of(self.tokenizer, pieces, self.context, clean, stride, end)

    def _published_windows(self, texts: list[str], protocol: str) -> Windows:
        encoded, clean = encode_checked(self.tokenizer, texts), self.family.process.vocabulary.clean
        return published_windows(
            find_protocol(protocol).read_by(self.family.objective),
            self.tokenizer,
            encoded.ids,
            texts,
            self.context,
            clean.cpu(),
            encoded.losses,
        )

    def estimate(
        self,
        texts: Sequence[str],
        *,
        protocol: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Estimates:
        """Bound the likelihood of documents.

        Args:
            texts: the documents.
            protocol: see `windows`; without an `estimator` it brings its own.
            seed: seed of the noise; two models of one seed have the same.
            **options: those of `windows`, and those of `likelihood.estimate`: `estimator`,
                `replicates`, `precision`, ...

        Raises:
            ConfigError: see `windows`, and an estimator that cannot score this model.
            DataError: see `windows`.
        """
        seed = whole_number("seed", seed)
        for name in COUNTS:
            if options.get(name) is not None:
                options[name] = whole_number(name, options[name])
        chosen = {name: options.pop(name) for name in SELECTION if name in options}
        windows = self.windows(texts, protocol=protocol, **chosen)
        options["preparer"] = Preparer(self.model, self.family, self.tokenizer)
        if protocol is None:
            return estimate(self.model, self.family, windows, seed=seed, **options)
        published = find_protocol(protocol)
        options = published.settings(options, self.family.block_size)
        bound = estimate(self.model, self.family, windows, seed=seed, **options)
        return replace(bound, note="; ".join(filter(None, [published.note, bound.note])))

    def score(self, texts: Sequence[str], **options: Any) -> list[Bound]:
        """Return the bound of each text; takes the options of `estimate` except a protocol.

        Every text draws noise often enough for an interval of its own.

        Raises:
            DataError: a text has no token, or characters that the tokenizer was not trained on.
        """
        texts = checked_texts(texts, "texts")
        if not texts:
            return []
        estimates = self.estimate(texts, each_document=True, **options)
        return [estimates.document(index) for index in range(len(texts))]

    def compare(self, other: "TextScorer", texts: Sequence[str], **options: Any) -> Difference:
        """Return this model's bound minus another's, under the same noise; below 0 it is better.

        In nats per token where both cut the texts into the same tokens and windows, else in bits
        per byte. Takes the options of `estimate`.

        Raises:
            DataError: see `estimate`.
        """
        texts = checked_texts(texts, "texts")

        def run(scorer: TextScorer, replicates: int) -> Estimates:
            return scorer.estimate(texts, **(options | {"replicates": replicates}))

        least = options.get("replicates", MIN_REPLICATES)
        return compare_models(partial(run, self), partial(run, other), least)[0]

    def check_whole(self) -> None:
        """Stop where the network is not what it was when this was made.

        Raises:
            ConfigError: it has no numbers, or another vocabulary.
        """
        if self.model.device.type == "meta":
            raise ConfigError(
                "the network is on device meta, which holds shapes without numbers; load it again "
                "with TextDiffusion.from_pretrained",
                code="on_meta_device",
            )
        rows, known = self.model.config.vocab_size, len(self.family.process.vocabulary.clean)
        if rows != known:
            raise ConfigError(
                f"the network was resized to {rows} ids, where tokenizer and process have {known}; "
                "save it with save_pretrained and load it again",
                code="resized_network",
            )
