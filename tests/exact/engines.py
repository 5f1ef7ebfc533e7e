"""Generation from rows of tokens, for tests."""

from collections.abc import Collection, Generator
from typing import Any

import torch
from torch import Tensor

from textdiff.sampling.controls import Controls
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.predictor import PlainPredictor
from textdiff.sampling.request import Request
from textdiff.sampling.step import Step

FREE = Controls()


def alone(model: Any, family: Any, widths: Tensor) -> PlainPredictor:
    """Return a predictor on canvases [A] positions wide, with nothing before them."""
    predictor = PlainPredictor(model, family)
    frozen = torch.zeros(len(widths), int(widths.max()), dtype=torch.bool)
    predictor.enter(frozen[:, :0].long(), 0 * widths, widths, frozen)
    return predictor


def generate(
    model: Any,
    family: Any,
    job: Job,
    *,
    controls: Controls = FREE,
    slots: int | None = None,
    parts: Collection[str] = (),
    **options: Any,
) -> Generator[Step, None, Tensor]:
    """Yield the steps of an engine, by default without cache and window; return its lengths."""
    chosen = {"cache": False, "window": 0}
    chosen |= {name: value for name, value in options.items() if value is not None}
    config = controls.config.merge(**chosen)
    request = Request(job, config, controls.hooks, controls.constraint, controls.end_tokens)
    engine = Engine(model, family, request, slots, parts)
    yield from engine.run()
    return engine.final
