"""What generated text must look like: patterns, banned and forced strings, over tokens."""

from collections.abc import Sequence

import torch

from textdiff.sampling.constraints.bytewise import automaton
from textdiff.sampling.constraints.constraint import Constraint, Draws, draw_jointly
from textdiff.sampling.constraints.pattern import Pattern
from textdiff.sampling.constraints.tokenwise import TokenAutomaton


def build_pattern(
    pattern: str | None,
    banned: Sequence[str],
    tokens: Sequence[bytes | None],
    end_token: int | None,
    min_new_tokens: int = 0,
    device: torch.device | None = None,
    forced: Sequence[str] = (),
) -> Pattern:
    """The constraint that the text of every hole matches a pattern and holds strings or does not.

    Args:
        pattern: regular expression; None: any text.
        banned: strings that it does not hold.
        tokens: [V] the bytes of each token; None for those that are never drawn.
        end_token: id of the end-of-text token, if the model draws one.
        min_new_tokens: tokens of an open end before it may be.
        device: where the model is.
        forced: strings that it holds, each somewhere.

    Raises:
        ConfigError: no regular expression, or one that is too large.
    """
    machine = TokenAutomaton.of(automaton(pattern, banned, forced), tokens, end_token)
    said = [] if pattern is None else [f"the pattern `{pattern}`"]
    said += [f"the ban of {_listed(banned)}"] if banned else []
    said += [f"the forced {_listed(forced)}"] if forced else []
    return Pattern(machine.to(device or torch.device("cpu")), " and ".join(said), min_new_tokens)


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(f"`{text}`" for text in texts)


__all__ = ["Constraint", "Draws", "Pattern", "build_pattern", "draw_jointly"]
