"""Texts sampled from a model under one setting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textdiff.evaluate.plan import Plan
from textdiff.evaluate.texts import Texts, of_sequences


@dataclass(frozen=True)
class Sampled:
    """Sampled texts.

    Attributes:
        texts: up to their ends.
        tokens_per_call: tokens written per network call of a row, those behind an end included.
    """

    texts: Texts
    tokens_per_call: float


def sample(plan: Plan, options: Mapping[str, Any]) -> Sampled:
    """Samples texts from nothing.

    Args:
        plan: model, number of texts and length.
        options: of `TextDiffusion.generate`, before those of the plan.

    Raises:
        ConfigError: options that the model refuses.
    """
    done = plan.model.generate(
        "",
        num_samples=plan.num_samples,
        batch_size=plan.batch_size,
        **{**plan.options, "max_new_tokens": plan.length, **options},
    )
    return Sampled(of_sequences(plan.model, done.sequences), done.tokens_per_forward)


def settings(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a text sampled with these options depends on, defaults included."""
    given = {**plan.options, "max_new_tokens": plan.length, **options}
    given.pop("seed", None)  # not an option of a model
    found = plan.model.defaults.merge(**given).to_export()
    found["steps"] = found.pop("max_denoising_steps")
    if found.get("cache") != "approximate":  # others change no text
        found.pop("cache", None)
    return found | {
        "seed": plan.seed,
        "num_samples": plan.num_samples,
        "block_size": plan.model.family.block_size,
        "dtype": str(plan.model.model.dtype).removeprefix("torch."),
    }
