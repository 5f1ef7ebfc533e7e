"""How a document ends: whether its end is scored, and what stands after it in its last block.

A model in blocks has no way to say that a block is short. What follows the last token of a document
in its block is therefore there, masked at every noise level and never scored: the network sees the
same masks wherever in the block the document ends, so that they tell nothing of its length. (Were
the block cut off there, predictions would be told for nothing where the document stops.) A network
with one block for the whole sequence is by default given the length, as in the published
evaluations; once the end is scored, its context is a block like any other.

Uniform and hybrid noise have no state in which a token is left open: every noisy token is a token,
and what it might be would have to be summed over.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.diffusion.family import Family
from textdiff.diffusion.process import Absorbing
from textdiff.errors import ConfigError
from textdiff.likelihood.windows import Windows


def end_token(tokenizer: PreTrainedTokenizerFast, clean: Tensor) -> int:
    """The id of the end-of-text token.

    Args:
        tokenizer: the model's.
        clean: [V] bool, ids that the model can predict.

    Raises:
        ConfigError: there is none, or the model cannot predict it.
    """
    token = tokenizer.eos_token_id
    if token is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token, so the end of a document has no probability; "
            "leave end_of_text (--end-of-text) out"
        )
    if token >= len(clean) or not bool(clean[token]):
        raise ConfigError(
            f"this model cannot predict {tokenizer.eos_token}, its tokenizer's end-of-text token; "
            "leave end_of_text (--end-of-text) out"
        )
    return int(token)


def stays_masked(windows: Windows, family: Family) -> bool:
    """Whether what follows a document in its last block is masked; else it is not there at all."""
    blocks = family.block_size is not None or windows.ends is not None
    return blocks and isinstance(family.process, Absorbing)


def with_rest(windows: Windows, family: Family, context: int) -> Windows:
    """The windows with the rest of their last block, as a family and its network want them.

    Args:
        windows: what is scored.
        family: its process and block size.
        context: tokens that the network sees at once; where blocks do not divide it, its last one
            is shorter.

    Raises:
        ConfigError: ends are to be scored, and the process cannot leave tokens open.
    """
    if windows.ends is not None and not isinstance(family.process, Absorbing):
        kind = type(family.process).__name__.lower()
        raise ConfigError(
            f"the end of a text cannot be scored under {kind} noise: what follows it in its block "
            "would have to be summed over, and no mask leaves it open; leave end_of_text "
            "(--end-of-text) out, which gives a bound given the length"
        )
    if not stays_masked(windows, family):
        return windows
    size = family.block_size or context
    lengths = torch.tensor([len(tokens) for tokens in windows.tokens])
    whole = (-(-lengths // size) * size).clamp(max=context)
    return windows.followed(whole - lengths)
