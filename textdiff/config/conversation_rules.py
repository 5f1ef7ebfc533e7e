"""Choices that prompt–answer training excludes."""

from typing import TYPE_CHECKING

from textdiff.diffusion.schedule import Learned
from textdiff.errors import ConfigError

if TYPE_CHECKING:
    from textdiff.config.schema import Config


def check_conversations(config: "Config") -> None:
    """Make sure that a config's conversations can be trained on exactly.

    Raises:
        ConfigError: another section excludes them.
    """
    conversations, diffusion = config.data.conversations, config.diffusion
    if conversations is None:
        return
    if conversations.packing == "packed" and None in diffusion.block_sizes:
        raise ConfigError(
            "data.conversations.packing: packed needs blocks: a full-sequence model (block_size: "
            "null) learns where an answer ends from the room behind it; set packing: padded, or "
            "diffusion.block_size",
            code="packed_full_sequence",
        )
    if isinstance(diffusion.schedule, Learned):
        raise ConfigError(
            "a learned schedule compares two masks of whole rows, prompts included; choose another "
            "diffusion.schedule for data.conversations",
            code="conversations_with_learned_schedule",
        )
    if diffusion.noise.prompts:
        raise ConfigError(
            "diffusion.noise.prompts makes prompts of the beginnings of plain text, and "
            "data.conversations have prompts of their own; set it to 0",
            code="conversations_with_random_prompts",
        )
    if diffusion.noise.range == "search":
        raise ConfigError(
            "diffusion.noise.range: search measures whole blocks of text, which answers seldom "
            "are; give data.conversations a fixed range",
            code="conversations_with_searched_range",
        )
