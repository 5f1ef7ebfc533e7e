"""Stage that compares recorded calls of the network with calls launched kernel by kernel."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from gpu_checks.checks import Check, Checks, contained, figure
from gpu_checks.device import timed
from gpu_checks.tokens import differing, written
from textdiff import TextDiffusion
from textdiff.models import graphs


def replays(device: torch.device, folder: Path) -> Checks:
    """Compare texts of the model that comes with the package, and the time that they take."""
    if not graphs.replays(device):
        yield Check("recorded calls", None, 0.0, "tests/devices does it on a CPU", True)
        return
    model = TextDiffusion.from_pretrained("demo", device=str(device), dtype="float64")
    for rule in ("ancestral", "threshold"):
        for cache in ("on", "off"):
            title = f"{rule}, cache {cache}"
            yield from contained(title, recorded_texts(model, rule, cache, title))
    model = TextDiffusion.from_pretrained("demo", device=str(device))
    for rows in (1, 16):
        title = f"{rows} rows, time of recorded calls"
        yield from contained(title, recorded_time(model, device, rows, title))


def recorded_texts(model: TextDiffusion, rule: str, cache: str, title: str) -> Checks:
    """Compare texts by recorded calls with others; none may fail to be recorded."""
    with messages(graphs.__name__) as said:
        texts = written(model, rule, cache)
    refused = [record.getMessage() for record in said if record.levelno >= logging.WARNING]
    shapes = len(said) - len(refused)
    yield Check(f"{title}: not recorded", float(len(refused)), 0.0, *refused[:1])
    yield Check(f"{title}: nothing recorded", float(not shapes), 0.0, f"{shapes} shapes")
    with without_recording(model):
        launched = written(model, rule, cache)
    yield Check(f"{title}: texts that differ", differing(texts, launched), 0.0)


def recorded_time(model: TextDiffusion, device: torch.device, rows: int, title: str) -> Checks:
    """Measure the time of texts by recorded calls over that of others."""
    request = {"num_samples": rows, "max_new_tokens": 128, "steps": 32, "seed": 0}
    write = partial(model.generate, "", **request)
    recorded = timed(write, device, 3)
    with without_recording(model):
        launched = timed(write, device, 3)
    yield figure(title, recorded / launched, "of launched ones")


@contextmanager
def without_recording(model: TextDiffusion) -> Iterator[None]:
    """Launch every kernel by itself while entered."""
    model.model.cuda_graphs = False
    try:
        yield
    finally:
        model.model.cuda_graphs = True


@contextmanager
def messages(name: str) -> Iterator[list[logging.LogRecord]]:
    """Keep all messages of a logger while entered."""
    logger, said = logging.getLogger(name), []
    handler, level = logging.Handler(), logger.level
    handler.emit = said.append
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
