"""Stage in which the CPU may not wait for the GPU: training steps, and calls of generation."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from gpu_checks.cases import OBJECTIVES, SMALL, Case
from gpu_checks.checks import Check, Checks, contained, short_place
from gpu_checks.device import finish
from textdiff import TextDiffusion
from textdiff.train.learned_loss import training_loss

# Decoding rules whose calls of the network have no wait between them.
RULES = ("ancestral", "confidence", "threshold", "entropy_bound")


def waits(device: torch.device, folder: Path) -> Checks:
    """Take every objective's step where to wait is an error, then count the waits of texts."""
    if device.type != "cuda":
        yield Check("a step without waiting", None, 0.0, "tests/devices does it on a CPU", True)
        return
    for name in OBJECTIVES:
        title = f"{name}: a step without waiting"
        yield from contained(title, step_without_waiting(device, name, title))
    model = TextDiffusion.from_pretrained("demo", device=str(device))
    model.model.cuda_graphs = False  # to record a shape is a wait, and more calls have more shapes
    for rule in RULES:
        title = f"{rule}: waits of 16 calls, less those of 8"
        yield from contained(title, waits_of_calls(model, rule, title))


def step_without_waiting(device: torch.device, name: str, title: str) -> Checks:
    """Take a step from a pinned batch; to wait is an error."""
    case = Case(name, 16 if name != "ar" else None, SMALL, 4, 64)
    case.step(device, torch.float32)  # caches are filled once
    model, family = case.model, case.family(device)
    pinned = case.batch.pin_memory()
    finish(device)
    with at_waits("error"):
        loss, _ = training_loss(model, family)(pinned.to(device))
        loss.backward()
    yield Check(title, 0.0, 0.0)


def waits_of_calls(model: TextDiffusion, rule: str, title: str) -> Checks:
    """Compare the waits of a text in more calls with those of one in fewer."""
    write = partial(model.generate, "", max_new_tokens=48, rule=rule, seed=0)
    _, few, many = (  # what waits once waits in the first
        places_of_waits(partial(write, steps=count)) for count in (8, 8, 16)
    )
    added = ", ".join(f"{count} at {place}" for place, count in (many - few).most_common(3))
    yield Check(title, float(many.total() - few.total()), 0.0, added)


def places_of_waits(call: Callable[[], object]) -> Counter[str]:
    """Count the warnings of torch that the CPU waits for the GPU, by line of code."""
    with warnings.catch_warnings(record=True) as caught, at_waits("warn"):
        warnings.simplefilter("always")
        call()
    return Counter(
        short_place(warning.filename, warning.lineno)
        for warning in caught
        if "synchroniz" in str(warning.message)
    )


@contextmanager
def at_waits(mode: str) -> Iterator[None]:
    """Raise an `error` or `warn` while entered, wherever the CPU waits for the GPU."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
