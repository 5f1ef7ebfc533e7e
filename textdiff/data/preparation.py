"""A prepared corpus on disk, so that the next run reads no text at all."""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import tokenizer_fingerprint
from textdiff.data.document_stream import corpus_fingerprint
from textdiff.data.packing import Verify, find_stream
from textdiff.data.token_stream import TokenStream
from textdiff.data.tokenizer import pretrained_tokenizer
from textdiff.errors import DataError


@dataclass(frozen=True)
class Preparation:
    """Content of a preparation on disk.

    Attributes:
        sources: facts about the text of every source.
        streams: the tokens, see `Corpus`.
        validation: the held-out documents.
        tokenizer: trained or loaded.
        omissions: what reading each source left out, as plain data.
    """

    sources: list[dict[str, Any]]
    streams: Sequence[TokenStream]
    validation: list[str]
    tokenizer: PreTrainedTokenizerFast
    omissions: list[dict[str, Any]]


def write_preparation(entry: Path, prepared: Preparation) -> None:
    """Write a preparation beside its place and rename it."""
    scratch = entry.with_name(f".partial-{entry.name}-{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        prepared.tokenizer.save_pretrained(scratch / "tokenizer")
        lines = [json.dumps(text) + "\n" for text in prepared.validation]
        (scratch / "validation.jsonl").write_text("".join(lines), encoding="utf-8")
        facts = {
            "sources": prepared.sources,
            "omissions": prepared.omissions,
            "streams": [stream.folder.name for stream in prepared.streams],
            "validation": corpus_fingerprint(prepared.validation),
            "tokenizer": tokenizer_fingerprint(prepared.tokenizer),
        }
        (scratch / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        if entry.exists():
            shutil.rmtree(entry)
        os.rename(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_preparation(entry: Path, verify: Verify) -> Preparation | None:
    """Return what an earlier preparation kept; None where any of it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, DataError):
        facts = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        lines = (entry / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        validation = [json.loads(line) for line in lines]
        tokenizer = pretrained_tokenizer(str(entry / "tokenizer"))
        hashes = (corpus_fingerprint(validation), tokenizer_fingerprint(tokenizer))
        if hashes != (facts["validation"], facts["tokenizer"]):
            return None
        streams = [find_stream(entry.parent / name, verify) for name in facts["streams"]]
        whole = [stream for stream in streams if stream is not None]
        if len(whole) == len(streams):
            omissions = facts.get("omissions", [{} for _ in facts["sources"]])
            return Preparation(facts["sources"], whole, validation, tokenizer, omissions)
    return None
