"""Stage that generates the same texts on two devices."""

from pathlib import Path

import torch

from gpu_checks.checks import Check, Checks
from textdiff import TextDiffusion

TEXT = "Return a new list containing all items of the iterable in ascending order."


def tokens(device: torch.device, folder: Path) -> Checks:
    """Compare texts and a bound with the CPU's, of the model that comes with the package."""
    model, reference = (
        TextDiffusion.from_pretrained("demo", device=where, dtype="float64")
        for where in (str(device), "cpu")
    )
    for rule in ("ancestral", "confidence"):
        texts = {cache: written(model, rule, cache) for cache in ("on", "off")}
        changed = differing(texts["on"], written(reference, rule, "on"))
        yield Check(f"texts that differ, {rule}", changed, 0.0)
        changed = differing(texts["on"], texts["off"])
        yield Check(f"texts that differ, {rule}, cached : uncached", changed, 0.0)
    value, expected = (each.score([TEXT])[0].mean for each in (model, reference))
    yield Check("bound of a text", abs(value / expected - 1.0), 1e-5)


def written(model: TextDiffusion, rule: str, cache: str) -> list[str]:
    """Return three texts."""
    request = {"num_samples": 3, "max_new_tokens": 48, "steps": 16, "seed": 0}
    return model.generate("", rule=rule, cache=cache, **request).texts


def differing(texts: list[str], others: list[str]) -> float:
    """Return the number of texts that differ from others, pair by pair."""
    return float(sum(one != other for one, other in zip(texts, others, strict=True)))
