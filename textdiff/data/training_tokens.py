"""A check of a tokenised corpus: it holds nothing that a model is never to predict."""

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerFast

from textdiff.data.token_stream import TokenStream
from textdiff.data.tokenizer import excluded_ids, vocabulary_size
from textdiff.errors import DataError

_PART = 1 << 24  # tokens that are looked at together


def refuse_excluded(
    stream: TokenStream, tokenizer: PreTrainedTokenizerFast, name: Callable[[int], str]
) -> None:
    """Look for tokens that the model gives no probability: their loss would be infinite.

    Args:
        stream: the training tokens.
        tokenizer: the tokenizer that made them.
        name: names a document of the stream by its number, from 0.

    Raises:
        DataError: there is one, with its document.
    """
    excluded = np.zeros(vocabulary_size(tokenizer), bool)
    excluded[list(excluded_ids(tokenizer))] = True
    for start in range(0, len(stream), _PART):
        tokens = stream.read(start, min(start + _PART, len(stream)))
        wrong = np.flatnonzero(excluded[tokens])
        if wrong.size:
            at = start + int(wrong[0])
            token = int(tokens[wrong[0]])
            raise DataError(
                f"{name(int(stream.documents(at, at + 1)[0]))} has the token "
                f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token}), which no model may "
                "predict: its text has characters that the tokenizer does not know; remove them, "
                "or choose a byte or bpe tokenizer"
            )
