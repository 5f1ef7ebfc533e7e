"""Published checkpoints whose network is a class of transformers.

A family names the class, its settings and the published names of weights. What all of them share is
here: the mask, tied embeddings under either name, rows of an embedding larger than its tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from textdiff.errors import CheckpointError, first_line
from textdiff.export.convert.checkpoint_family import CheckpointFamily, Converted
from textdiff.section import Tensor, Whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

HEAD = "lm_head.weight"

MASKED: dict[str, Any] = {
    "process": "absorbing",
    "schedule": {"kind": "loglinear"},
    "objective": {"kind": "mdlm"},
    "timesteps": None,
}
"""Masked diffusion, linear in time."""

# Keys of a config.json that describe a file or remote code, not the network.
NOT_SETTINGS = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "model_type",
    "name_or_path",
    "torch_dtype",
    "transformers_version",
}


class StockNetwork(CheckpointFamily):
    """A family whose network is a class of transformers.

    Attributes:
        model_type: that of the class in transformers.
        published_mask: id of the mask in the published models.
        embedding: name of the embedding's weight in transformers' class.
        shift: whether the output at a position is about the next token.
        tokenizer: hub id of the tokenizer of models that are published without one.
    """

    mask_token_id: Whole | None = Field(
        None,
        ge=0,
        description="id of the mask; none: as config or tokenizer say, else as published",
    )
    block_size: Whole | None = Field(
        None, ge=1, description="tokens per block; none: as the config or the name says"
    )

    model_type: ClassVar[str]
    published_mask: ClassVar[int | None] = None
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    shift: ClassVar[bool] = False
    tokenizer: ClassVar[str | None] = None

    def architecture(self, config: Mapping[str, Any]) -> str:
        """Return the model type of the class in transformers."""
        return self.model_type

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the class in transformers: mostly those of the config."""
        return {key: value for key, value in config.items() if key not in NOT_SETTINGS}

    def rename(self, name: str) -> str:
        """Return the name of a published weight in the class of transformers."""
        return name

    def own_tokenizer(self) -> str | Callable[[], PreTrainedTokenizerFast] | None:
        """Return the tokenizer of models that are published without one, or its maker."""
        return self.tokenizer

    def blocks(self, config: Mapping[str, Any]) -> int | None:
        """Return the published block size; None: the whole sequence."""
        return None

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return process, schedule, objective and steps: masked diffusion, linear in time."""
        return MASKED | ({"objective": {"kind": "mdlm", "shift": True}} if self.shift else {})

    def convert(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Converted:
        """See `CheckpointFamily`."""
        if config.get("quantization_config"):
            raise CheckpointError(
                "its weights are quantised, and bounds need the weights themselves; use the "
                "checkpoint in bfloat16 or float32",
                code="quantised",
            )
        named = {self.rename(name): weight for name, weight in weights.items()}
        settings = self.settings(config) | {"tie_word_embeddings": self._tie(config, named)}
        rows, mask = len(named[self.embedding]), self._mask(config, len(named[self.embedding]))
        size = self.block_size or self.blocks(config)
        settings |= {
            "vocab_size": max(rows, mask + 1),
            "mask_token_id": mask,
            "excluded_token_ids": [],
            "diffusion": self.diffusion(config) | {"block_size": size},
        }
        built = stock_configuration(self.architecture(config), settings)
        return Converted(built, named, self.own_tokenizer(), rows=rows)

    def _tie(self, config: Mapping[str, Any], named: dict[str, Tensor]) -> bool:
        """Store a matrix that the files hold once under both names; return whether it is one.

        Raises:
            CheckpointError: there is neither.
        """
        table, head = named.get(self.embedding), named.get(HEAD)
        if table is None and head is None:
            raise CheckpointError(
                f"the weights have neither {self.embedding} nor {HEAD}, and checkpoints of family "
                f"{self.kind} have one of them; name another family with --from",
                code="wrong_family",
            )
        if table is None or head is None:
            one = head if table is None else table
            assert one is not None
            named[self.embedding] = named[HEAD] = one
            return True
        if not config.get("tie_word_embeddings"):
            return False
        named[HEAD] = table  # official classes tie them, whatever a file holds
        return True

    def _mask(self, config: Mapping[str, Any], rows: int) -> int:
        """Return the mask's id; the first after all rows where nothing says which it is.

        Raises:
            ConfigError: the id asked for is beyond the rows.
        """
        said = config.get("mask_token_id") if self.mask_token_id is None else self.mask_token_id
        if said is None:
            said = self.published_mask
            return rows if said is None or said >= rows else said
        if said > rows:
            raise CheckpointError(
                f"mask_token_id {said}: the embedding has {rows} rows; give the id of one of them, "
                f"or {rows} to add one",
                code="mask_beyond_rows",
            )
        return int(said)


def stock_configuration(kind: str, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a configuration of transformers.

    Args:
        kind: the model type.
        settings: its values.

    Raises:
        CheckpointError: they are not valid.
    """
    from transformers import AutoConfig

    try:
        built: PreTrainedConfig = AutoConfig.for_model(kind, **settings)
    except Exception as error:  # strict dataclasses raise errors of their own
        raise CheckpointError(
            f"its config is not one of {kind!r} in transformers ({first_line(error)})",
            code="wrong_setting",
        ) from None
    return built


def published_name(config: Mapping[str, Any]) -> str:
    """Return the name that a checkpoint is published under: the end of its hub id or folder."""
    place = str(config.get("name_or_path") or "").replace("\\", "/").rstrip("/")
    cached = re.search(r"models--([^/]+)", place)  # the hub's cache: .../models--OWNER--NAME/...
    return cached[1].split("--")[-1] if cached else place.rsplit("/", 1)[-1]
