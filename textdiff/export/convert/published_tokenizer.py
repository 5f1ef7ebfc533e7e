"""Tokenizers of published checkpoints, with the special tokens that a model of ours needs."""

import copy
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from textdiff.data.sections import MASK, PAD
from textdiff.data.tokenizer import ensure_special_tokens, load_tokenizer, vocabulary_size
from textdiff.errors import CheckpointError, DataError, first_line
from textdiff.export.convert.checkpoint_family import Converted
from textdiff.export.convert.dit import append_rows


def find_tokenizer(
    place: Path, converted: Converted, wanted: str | None
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a published checkpoint, as it is.

    Args:
        place: folder or file of the checkpoint.
        converted: names the tokenizer that such checkpoints were published with.
        wanted: folder or hub id of another one; None: that of the folder, else the published one.

    Raises:
        CheckpointError: there is none.
        DataError: the wanted one cannot be loaded.
    """
    if wanted is not None:
        return load_tokenizer(wanted)
    folder = place if place.is_dir() else place.parent
    if converted.as_it_is:
        return _own_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        try:  # not AutoTokenizer, which would read the model type in a config.json of other codes
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            message = f"the tokenizer in {folder} is damaged ({first_line(error)})"
            raise CheckpointError(message, code="damaged") from None
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return load_tokenizer(str(folder))
    return _known_tokenizer(place, converted)


_NAME_ONE = "name one: `textdiff convert SOURCE TARGET --tokenizer PATH_OR_ID`, or tokenizer="


def _own_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a language model, whose class is that of transformers."""
    try:
        return load_tokenizer(str(folder))
    except DataError as error:
        raise CheckpointError(f"{error}; {_NAME_ONE}", code="no_tokenizer") from None


def _known_tokenizer(place: Path, converted: Converted) -> PreTrainedTokenizerFast:
    """Return the tokenizer that such checkpoints were published with.

    Raises:
        CheckpointError: none is known, or it cannot be fetched.
    """
    if callable(converted.tokenizer):
        return converted.tokenizer()
    if converted.tokenizer is None:
        message = (
            f"{place} has no tokenizer files, and none is known for its {_rows(converted)} rows"
        )
        raise CheckpointError(f"{message}; {_NAME_ONE}", code="no_tokenizer")
    try:
        return load_tokenizer(converted.tokenizer)
    except DataError:
        raise CheckpointError(
            f"{place} has no tokenizer files, and {converted.tokenizer}, which it was published "
            f"with, is neither in the local hub cache nor can it be fetched; {_NAME_ONE}",
            code="no_tokenizer",
        ) from None


def _rows(converted: Converted) -> int:
    return int(converted.config.vocab_size)


def with_special_tokens(
    converted: Converted, tokenizer: PreTrainedTokenizerFast
) -> tuple[Converted, PreTrainedTokenizerFast]:
    """Return checkpoint and tokenizer with one mask and one padding token, which fit each other.

    A token that the tokenizer lacks is added where the checkpoint has its row. A padding token that
    the checkpoint has no row for gets one at the end; it is never predicted.

    Raises:
        CheckpointError: the tokenizer is not that of the checkpoint.
    """
    config, tokenizer = copy.deepcopy(converted.config), copy.deepcopy(tokenizer)
    if converted.as_it_is and converted.rows is not None:
        _fit_language_model(config, converted.rows, tokenizer)
        return replace(converted, config=config), tokenizer
    _fit_mask(tokenizer, config.mask_token_id)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": PAD})
    weights = converted.weights
    if tokenizer.pad_token_id == config.vocab_size:
        if converted.rows is None:  # others grow when they are loaded
            weights = append_rows(weights, 1)
        config.vocab_size += 1
        config.excluded_token_ids = [*(config.excluded_token_ids or ()), tokenizer.pad_token_id]
    _check_rows(tokenizer, config.vocab_size)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return replace(converted, config=config, weights=weights), tokenizer


_ADVICE = "name the tokenizer that it was trained with"


def _check_rows(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Refuse a tokenizer with ids that a checkpoint has no rows for."""
    if vocabulary_size(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer has {vocabulary_size(tokenizer)} ids and the checkpoint {rows} rows: "
            f"it is another model's; {_ADVICE}",
            code="tokenizer_does_not_fit",
        )


def _fit_language_model(
    config: PreTrainedConfig, rows: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Give a language model's tokenizer, in place, mask and padding, and their ids to its config.

    Spare rows of the embedding are used before others are added. They name nothing, so they are
    never predicted.
    """
    _check_rows(tokenizer, rows)
    if config.mask_token_id < rows:
        _fit_mask(tokenizer, config.mask_token_id)
    own = vocabulary_size(tokenizer)
    ensure_special_tokens(tokenizer)
    config.mask_token_id = tokenizer.mask_token_id
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.vocab_size = max(rows, vocabulary_size(tokenizer))
    config.excluded_token_ids = [
        index for index in range(own, config.vocab_size) if index != tokenizer.mask_token_id
    ]


def _fit_mask(tokenizer: PreTrainedTokenizerFast, mask: int) -> None:
    """Give a tokenizer, in place, its mask token at the id that the checkpoint has for it."""
    if tokenizer.mask_token_id == mask:
        return
    if len(tokenizer) < mask and tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})  # a state of Duo, before its mask
    token = tokenizer.convert_ids_to_tokens(mask) if mask < len(tokenizer) else None
    if token is None and len(tokenizer) != mask:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, and the checkpoint's mask is {mask}: it "
            f"is another model's; {_ADVICE}",
            code="tokenizer_does_not_fit",
        )
    tokenizer.add_special_tokens({"mask_token": token or MASK})
