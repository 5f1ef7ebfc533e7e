"""Published checkpoints: families by name, their files, and their reading as our models."""

from collections.abc import Collection, Mapping
from typing import Any

from textdiff.errors import CheckpointError
from textdiff.export.convert.checkpoint_family import CheckpointFamily, Converted
from textdiff.export.convert.diffugpt import DiffuGPTCheckpoint, DiffuLLaMACheckpoint
from textdiff.export.convert.dit_ar import ARCheckpoint
from textdiff.export.convert.dit_bd3lm import BD3LMCheckpoint
from textdiff.export.convert.dit_gidd import GIDDCheckpoint
from textdiff.export.convert.dit_mdlm import MDLMCheckpoint
from textdiff.export.convert.dit_sedd import SEDDAsMDLM, SEDDCheckpoint
from textdiff.export.convert.dit_uniform import DuoCheckpoint, UDLMCheckpoint
from textdiff.export.convert.language_model import CausalLMCheckpoint, MaskedLMCheckpoint
from textdiff.export.convert.llada import LLaDACheckpoint
from textdiff.export.convert.qwen import A2DCheckpoint, DreamCheckpoint, SDARCheckpoint
from textdiff.export.convert.tiny_diffusion import TinyDiffusionCheckpoint
from textdiff.pretrained import refusal
from textdiff.registry import Registry
from textdiff.sampling.settings import read_knobs

CHECKPOINT_FAMILIES = Registry[CheckpointFamily](
    "checkpoint family",
    [
        MDLMCheckpoint,
        SEDDCheckpoint,
        SEDDAsMDLM,
        BD3LMCheckpoint,
        ARCheckpoint,
        UDLMCheckpoint,
        DuoCheckpoint,
        GIDDCheckpoint,
        LLaDACheckpoint,
        DreamCheckpoint,
        SDARCheckpoint,
        A2DCheckpoint,
        DiffuGPTCheckpoint,
        DiffuLLaMACheckpoint,
        TinyDiffusionCheckpoint,
        CausalLMCheckpoint,
        MaskedLMCheckpoint,
    ],
)

__all__ = ["CHECKPOINT_FAMILIES", "CheckpointFamily", "Converted", "find_checkpoint_family"]


def find_checkpoint_family(
    place: object, config: Mapping[str, Any], names: Collection[str], wanted: str | None = None
) -> CheckpointFamily:
    """Return the family of a checkpoint.

    Args:
        place: where it is, for messages.
        config: content of its config file.
        names: names of its weights, without prefixes and buffers.
        wanted: a family's name, which overrules recognition; options may follow it, as in
            `sdar block_size=16`.

    Raises:
        CheckpointError: its family is not known.
        ConfigError: the wanted name, or an option after it, is unknown.
    """
    if wanted is not None:
        name, *options = wanted.split() or [""]
        return CHECKPOINT_FAMILIES.build(name, read_knobs(options))
    for kind, family in CHECKPOINT_FAMILIES.items():
        if family.matches(config, names):
            return CHECKPOINT_FAMILIES.build(kind)
    problem = refusal(dict(config)) if config.get("auto_map") else None
    if problem is not None:
        code, reason = problem
        raise CheckpointError(
            f"{place}: {reason}; or name the family of its weights with --from: "
            f"{', '.join(CHECKPOINT_FAMILIES)}",
            code=code,
        )
    described = config.get("model_type") or ", ".join(sorted(names)[:3]) or "nothing"
    raise CheckpointError(
        f"{place} is not a textdiff export and of no known family of checkpoints ({described}); "
        f"known are {', '.join(CHECKPOINT_FAMILIES)}: name one with --from (in Python: family=)",
        code="not_an_export",
    )
