"""An evaluation taken apart: figures of every document, and nats of every token."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from textdiff.evaluate.record import after_the_end
from textdiff.likelihood import Estimates
from textdiff.likelihood.bound import finite
from textdiff.likelihood.estimate import END
from textdiff.likelihood.estimates import standard_error
from textdiff.pipeline import TextDiffusion


def document_records(
    model: TextDiffusion, estimates: Estimates, per_token: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields figures of one document after the other.

    Args:
        model: the model that was evaluated; its tokenizer names tokens.
        estimates: what was found.
        per_token: whether to add `token_text` and `token_nats` of the scored tokens; the estimate
            must have kept them (`attribute=True`).

    Yields:
        `document` (from 1), `tokens`, `bytes`, and unless nothing is scored `nats`, `stderr_nats`
        (None where it is in doubt), `is_reliable` and the `replicates` it comes from, `is_bound`,
        what follows its end (`after_the_end`) and, where ends are scored, what that costs of the
        nats (`end_of_text_nats`); documents with tokens have `perplexity` and `bits_per_byte`
        besides; documents that their tokens do not give back have no bits per byte, and say what is
        `lost`.
    """
    windows = estimates.windows
    tokens = _tokens(model, estimates) if per_token else {}
    for index, count in enumerate(windows.document_tokens.tolist()):
        line: dict[str, Any] = {
            "document": index + 1,
            "tokens": count,
            "bytes": int(windows.document_bytes[index]),
        }
        if count or windows.ends is not None:
            line |= _figures(estimates, index) | {"after_the_end": after_the_end(model, estimates)}
        if count:
            bound = estimates.document(index)
            line |= {"perplexity": finite(bound.perplexity), "bits_per_byte": bound.bits_per_byte}
        yield line | _lost(estimates, index) | tokens.get(index, {})


def _figures(estimates: Estimates, index: int) -> dict[str, Any]:
    """What all tokens of a document cost together."""
    nats = estimates.nats[:, index]
    stderr = 0.0 if estimates.exact else standard_error(nats)
    doubt = estimates.tail(slice(index, index + 1)).doubt
    found: dict[str, Any] = {"nats": float(nats.mean()), "stderr_nats": None if doubt else stderr}
    found |= {"is_reliable": not doubt} | ({"doubt": doubt} if doubt else {})
    found |= {"replicates": estimates.replicates, "is_bound": estimates.is_bound(index)}
    if END in estimates.parts:
        found["end_of_text_nats"] = float(estimates.parts[END][:, index].mean())
    return found


def _lost(estimates: Estimates, index: int) -> dict[str, Any]:
    """What a document's tokens do not give back; empty if they do."""
    loss = estimates.windows.losses.get(index)
    return {} if loss is None else {"is_bound": False, "lost": asdict(loss)}


def _tokens(model: TextDiffusion, estimates: Estimates) -> dict[int, dict[str, list[Any]]]:
    """Scored tokens of each document, in order, as text and nats."""
    windows = estimates.windows
    found: dict[int, dict[str, list[Any]]] = {}
    for w, nats in enumerate(estimates.token_nats()):
        mine = found.setdefault(int(windows.document[w]), {"token_text": [], "token_nats": []})
        keep = slice(None) if windows.scored is None else windows.scored[w]
        ids = windows.tokens[w][keep].tolist()
        mine["token_text"] += [str(model.tokenizer.decode([token])) for token in ids]
        mine["token_nats"] += nats.numpy()[keep].tolist()
    return found
