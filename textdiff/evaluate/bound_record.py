"""An evaluation as plain JSON data: the number with everything it depends on, and its documents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from textdiff.export.records import code_record, model_record
from textdiff.likelihood.bound import finite
from textdiff.likelihood.estimates import Estimates, standard_error
from textdiff.likelihood.estimators import ESTIMATORS, build_estimator
from textdiff.likelihood.protocols import PROTOCOLS, Protocol
from textdiff.likelihood.replicates import END
from textdiff.likelihood.windows import stays_masked
from textdiff.models.half_blocks import dtype_name
from textdiff.pipeline import TextDiffusion


def evaluation_record(
    model: TextDiffusion,
    estimates: Estimates,
    options: Mapping[str, Any],
    *,
    detokenizer: str = "none",
    processes: int = 1,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a bound and what it takes to compute it again.

    Args:
        model: the model that was evaluated.
        estimates: its estimates.
        options: those of `TextDiffusion.estimate` that made them; unset ones may be missing.
        detokenizer: name of what was done to the texts before.
        processes: how many shared the work.
        command: the command line, if there was one.
    """
    protocol = PROTOCOLS.get(options.get("protocol") or "none")
    return {
        **estimates.bound().to_dict(),
        **({"calls_per_token": estimates.calls_per_token} if estimates.calls else {}),
        "estimator_settings": _settings(model, estimates.estimator, options, protocol),
        "seed": options.get("seed", 0),
        "dtype": dtype_name(model.model),
        "context": model.model.context,
        "block_size": model.family.block_size,
        "stride": options.get("stride"),
        "end_of_text": estimates.windows.ends is not None,
        "after_the_end": after_the_end(model, estimates),
        "lossy_documents": [document + 1 for document in estimates.losses()],
        "windows": len(estimates.windows.tokens),
        "text_sha256": estimates.windows.text_digest or None,
        "windows_sha256": estimates.windows.digest,
        "detokenizer": detokenizer,
        "protocol": protocol.name if protocol else "none",
        "biases": list(protocol.biases(estimates.estimator)) if protocol else [],
        "provenance": result_origin(model, processes=processes, command=list(command)),
    }


def result_origin(model: TextDiffusion, **more: Any) -> dict[str, Any]:
    """Return the origin of a result: the model's files, the code, the device, and more."""
    device = model.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**model_record(model.folder), "code": code_record(), "device": name, **more}


def _settings(
    model: TextDiffusion, estimator: str, options: Mapping[str, Any], protocol: Protocol | None
) -> dict[str, Any]:
    """Return the estimator's own options, defaults included."""
    names = [name for name in ESTIMATORS[estimator].model_fields if name != "kind"]
    own = {name: options.get(name) for name in (*names, "estimator")}
    if protocol:
        own = protocol.settings(own, model.family.block_size)
    return build_estimator(estimator, **{name: own.get(name) for name in names}).options()


def after_the_end(model: TextDiffusion, estimates: Estimates) -> str:
    """Return what follows a document in its last block: `masked` and unscored, or `nothing`."""
    return "masked" if stays_masked(estimates.windows, model.family) else "nothing"


def document_records(
    model: TextDiffusion, estimates: Estimates, per_token: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield figures of one document after the other.

    Args:
        model: the model that was evaluated; its tokenizer names tokens.
        estimates: its estimates.
        per_token: whether to add `token_text` and `token_nats` of the scored tokens; the estimate
            must have kept them (`attribute=True`).

    Yields:
        `document` (from 1), `tokens`, `bytes`, and unless nothing is scored `nats`, `stderr_nats`
        (None where it is in doubt), `is_reliable` and the `replicates` it comes from, `is_bound`,
        what follows its end (`after_the_end`) and, where ends are scored, their share of the nats
        (`end_of_text_nats`); documents with tokens have `perplexity` and `bits_per_byte` besides;
        documents that their tokens do not give back have no bits per byte, and list what is `lost`.
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
            line |= {
                "perplexity": finite(bound.perplexity),
                "bits_per_byte": bound.to_dict()["bits_per_byte"],
            }
        if loss := windows.losses.get(index):
            line |= {"is_bound": False, "lost": asdict(loss)}
        yield line | tokens.get(index, {})


def _figures(estimates: Estimates, index: int) -> dict[str, Any]:
    """Return the nats of all tokens of a document together, with their error."""
    nats = estimates.nats[:, index]  # [R]
    stderr = 0.0 if estimates.exact else standard_error(nats)
    doubt = estimates.tail(slice(index, index + 1)).doubt
    figures: dict[str, Any] = {
        "nats": finite(float(nats.mean())),
        "stderr_nats": None if doubt else stderr,
    }
    figures |= {"is_reliable": not doubt} | ({"doubt": doubt} if doubt else {})
    figures |= {"replicates": estimates.replicates, "is_bound": estimates.is_bound(index)}
    if END in estimates.parts:
        figures["end_of_text_nats"] = float(estimates.parts[END][:, index].mean())
    return figures


def _tokens(model: TextDiffusion, estimates: Estimates) -> dict[int, dict[str, list[Any]]]:
    """Return the scored tokens of each document, in order, as text and nats."""
    windows = estimates.windows
    tokens: dict[int, dict[str, list[Any]]] = {}
    for w, nats in enumerate(estimates.token_nats()):
        line = tokens.setdefault(int(windows.document[w]), {"token_text": [], "token_nats": []})
        keep = slice(None) if windows.scored is None else windows.scored[w]
        ids = windows.tokens[w][keep].tolist()
        line["token_text"] += [str(model.tokenizer.decode([token])) for token in ids]
        line["token_nats"] += map(finite, nats.numpy()[keep].tolist())
    return tokens
