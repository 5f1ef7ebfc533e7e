"""Families of published checkpoints: how their config and weights are read as a model of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from textdiff.errors import CheckpointError
from textdiff.section import Section, Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Converted:
    """A published checkpoint in the terms of this package.

    Attributes:
        config: a `TextDiffusionConfig`, or a configuration of transformers with the same extra
            attributes: `diffusion`, `mask_token_id` and `excluded_token_ids`.
        weights: tensors under the names of the network that the configuration describes.
        tokenizer: hub id of the tokenizer that the checkpoint was published with, or a function
            that makes it; None: unknown.
        rows: ids that the weights of a network of transformers have; those after them are added
            when it is loaded. None: the network is ours.
        as_it_is: whether it is a language model of transformers, whose tokenizer is of its class.
    """

    config: PreTrainedConfig
    weights: dict[str, Tensor]
    tokenizer: str | Callable[[], PreTrainedTokenizerFast] | None = None
    rows: int | None = None
    as_it_is: bool = False


class CheckpointFamily(Section):
    """One family of published checkpoints.

    Attributes:
        ids: hub ids that it is published under.
        repository: where the official code is.
        licence: of code and weights, as far as it is stated.
    """

    kind: str

    ids: ClassVar[tuple[str, ...]] = ()
    repository: ClassVar[str] = ""
    licence: ClassVar[str | None] = None

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether a checkpoint is of this family.

        Args:
            config: content of its config file.
            names: names of its weights, without prefixes and buffers.
        """
        raise NotImplementedError

    def convert(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Converted:
        """Return configuration and weights of a checkpoint in our terms.

        Args:
            config: content of its config file.
            weights: by name, without prefixes and buffers.

        Raises:
            CheckpointError: the config lacks a value, or the weights are not of this family.
        """
        raise NotImplementedError

    def setting(self, config: Mapping[str, Any], *names: str) -> Any:
        """Return the first of several settings that a config has.

        Args:
            config: content of a config file, which may be nested.
            *names: keys, with dots between levels.

        Raises:
            CheckpointError: it has none of them.
        """
        value = lookup(config, *names)
        if value is None:
            raise CheckpointError(
                f"the config has no {' or '.join(map(repr, names))}, which checkpoints of family "
                f"{self.kind} need; add it to config.json, or name another family with --from",
                code="missing_setting",
            )
        return value


def lookup(config: Mapping[str, Any], *names: str) -> Any:
    """Return the first of several settings that a config has, or None.

    Args:
        config: content of a config file, which may be nested.
        *names: keys, with dots between levels.
    """
    for name in names:
        value: Any = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None
