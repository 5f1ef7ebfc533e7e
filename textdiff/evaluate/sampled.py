"""Texts sampled from a model under one setting."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
    own = {"seed", "cache"}  # arguments of `generate`, not settings of a model
    given = {**plan.options, "max_new_tokens": plan.length, **options}
    changed = {key: value for key, value in given.items() if key not in own}
    found = asdict(plan.model.defaults.changed(changed))
    found["steps"] = found.pop("max_denoising_steps")
    if given.get("cache") == "approximate":  # others change no text
        found["cache"] = given["cache"]
    return found | {
        "seed": plan.seed,
        "num_samples": plan.num_samples,
        "block_size": plan.model.family.block_size,
        "dtype": str(plan.model.model.dtype).removeprefix("torch."),
    }
