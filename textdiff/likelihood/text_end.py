"""The token that ends a text, where its probability is scored, too."""

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.errors import ConfigError


def end_token(tokenizer: PreTrainedTokenizerFast, clean: Tensor) -> int:
    """Return the id of the end-of-text token.

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
            "leave end_of_text (--end-of-text) out",
            code="no_end_of_text_token",
        )
    if token >= len(clean) or not bool(clean[token]):
        raise ConfigError(
            f"this model cannot predict {tokenizer.eos_token}, its tokenizer's end-of-text token; "
            "leave end_of_text (--end-of-text) out",
            code="end_of_text_not_predicted",
        )
    return int(token)
