"""Language models of transformers as they are: their own class reads their files.

Causal ones predict left to right, and their likelihood is exact. Masked ones fill masks in full
sequences. Ids that a model lacks, such as a mask, follow its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from textdiff.errors import CheckpointError, DataError
from textdiff.export.convert.checkpoint_family import CheckpointFamily, Converted
from textdiff.export.convert.stock_network import (
    MASKED,
    NOT_SETTINGS,
    stock_configuration,
)
from textdiff.pretrained import refusal
from textdiff.section import Tensor, Whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LanguageModel(CheckpointFamily):
    """Base of the families whose config, names and weights are those of transformers.

    Attributes:
        mapping: name of the table of such classes in transformers.
    """

    mapping: ClassVar[str]

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether the config names a class of this kind, and no code beside it."""
        from transformers.models.auto import modeling_auto

        known = getattr(modeling_auto, cls.mapping)
        named = (config.get("architectures") or [None])[0]
        return named is not None and known.get(config.get("model_type")) == named

    def described(self, config: Mapping[str, Any]) -> PreTrainedConfig:
        """Return the configuration of transformers.

        Raises:
            CheckpointError: it is of no language model that can be used.
        """
        problem = refusal(dict(config))
        if problem is not None:
            code, reason = problem
            raise CheckpointError(reason, code=code)
        settings = {key: value for key, value in config.items() if key not in NOT_SETTINGS}
        settings["architectures"] = config.get("architectures")  # causal or masked
        return stock_configuration(str(config["model_type"]), settings)

    def converted(
        self, built: PreTrainedConfig, weights: Mapping[str, Tensor], mask: int, diffusion: Any
    ) -> Converted:
        """Return a model with its mask, which may follow its own rows."""
        rows = built.vocab_size
        facts = {
            "vocab_size": max(rows, mask + 1),
            "mask_token_id": mask,
            "excluded_token_ids": [],
            "diffusion": diffusion,
        }
        for name, value in facts.items():
            setattr(built, name, value)
        return Converted(built, dict(weights), rows=rows, as_it_is=True)


class CausalLMCheckpoint(LanguageModel):
    """Causal language model, such as Llama, Qwen, SmolLM, GPT-2 or Pythia."""

    kind: Literal["causal-lm"] = "causal-lm"
    mapping = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether it is one, and nothing says that it fills masks."""
        fills = config.get("mask_token_id") is not None or config.get("auto_map")
        return super().matches(config, names) and not fills

    def convert(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Converted:
        """See `CheckpointFamily`: the next token's prediction, from the beginning of text on.

        Raises:
            CheckpointError: it was trained to fill masks, and predicts no next token.
        """
        if any(str(name).endswith("MaskedLM") for name in config.get("architectures") or ()):
            raise CheckpointError(
                "it is a masked language model, which predicts no next token; leave out --from, or "
                "take masked-lm",
                code="wrong_family",
            )
        built, start = self.described(config), config.get("bos_token_id")
        objective = {"kind": "ar"} | ({} if start is None else {"start": start})
        return self.converted(
            built, weights, built.vocab_size, MASKED | {"objective": objective, "block_size": 1}
        )


class MaskedLMCheckpoint(LanguageModel):
    """Masked language model, such as BERT, RoBERTa, DistilBERT or ModernBERT."""

    kind: Literal["masked-lm"] = "masked-lm"
    mapping = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"

    mask_token_id: Whole | None = Field(
        None, ge=0, description="id of the mask; none: as config or tokenizer say"
    )

    def convert(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Converted:
        """See `CheckpointFamily`: masked diffusion of full sequences with its own mask.

        Raises:
            CheckpointError: nothing says which id is the mask.
        """
        built = self.described(config)
        mask = self.mask_token_id
        if mask is None:
            mask = config.get("mask_token_id")
        if mask is None:
            mask = _tokenizer_mask(str(config.get("name_or_path")))
        if mask is None or not 0 <= mask < built.vocab_size:
            raise CheckpointError(
                f"its mask is {'unknown' if mask is None else mask}, and a masked language model "
                f"has one among its {built.vocab_size} ids; name it: --from 'masked-lm "
                "mask_token_id=ID' (in Python: family=)",
                code="no_mask",
            )
        return self.converted(built, weights, mask, MASKED | {"block_size": None})


def _tokenizer_mask(place: str) -> int | None:
    """Return the mask that a folder's tokenizer has by its class, such as BERT's."""
    from textdiff.data.tokenizer import load_tokenizer

    folder = Path(place)
    try:
        mask: int | None = load_tokenizer(
            str(folder if folder.is_dir() else folder.parent)
        ).mask_token_id
    except DataError:
        return None
    return mask
