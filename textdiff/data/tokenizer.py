"""Tokenizers: trained on the corpus (bpe, char, byte) or loaded (any Hugging Face tokenizer).

Trained ones keep their special tokens at the end of the vocabulary, lose nothing (`decode` of
`encode` is the text, for `char` as far as its characters were seen) and reload through
`AutoTokenizer`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from textdiff.config import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    PretrainedTokenizer,
)
from textdiff.data.backend import (
    BYTE_TOKEN,
    added_tokens,
    byte_characters,
    serialize,
    special_ids,
    stages,
)
from textdiff.data.encode import split_long
from textdiff.errors import DataError, first_line
from textdiff.storage import refuse_pointers

EOS, PAD, MASK, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|mask|>", "<|unk|>"

_HUB_TIMEOUT_SECONDS = 10.0
_ROLES = ("eos_token", "unk_token", "pad_token", "bos_token", "sep_token", "cls_token")
TRAINING_PIECE_CHARACTERS = 100_000  # the trainer holds hundreds of texts at a time


def train_tokenizer(
    section: BpeTokenizer | CharTokenizer | ByteTokenizer, texts: Iterable[str]
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer; equal texts in equal order give an equal tokenizer.

    Args:
        section: the config's tokenizer. A small corpus may yield fewer tokens than
            `BpeTokenizer.vocab_size` asks for.
        texts: the training documents; `byte` does not read them.

    Returns:
        A tokenizer whose last ids are `<|endoftext|>`, `<|pad|>` and `<|mask|>` (`char`:
        `<|unk|>` before them).
    """
    if isinstance(section, BpeTokenizer):
        backend, unknown = _bpe(section.vocab_size, texts), None
    elif isinstance(section, CharTokenizer):
        backend, unknown = _char(texts), UNKNOWN
    else:
        backend, unknown = _byte(), None
    specials = [token for token in (unknown, EOS, PAD, MASK) if token is not None]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Loads a Hugging Face tokenizer and gives it the special tokens that it lacks.

    Args:
        path: a folder (also one with only `vocab.json` and `merges.txt`) or a hub id.

    Raises:
        DataError: there is no such tokenizer, or it has no fast implementation.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        refuse_pointers(folder, DataError)
        tokenizer = _from_folder(folder)
    elif folder.exists():
        raise DataError(f"{path} is a file; give the folder that holds the tokenizer files")
    elif path.startswith((".", "~", "/")) or path.count("/") > 1:
        raise DataError(f"{path}: no such tokenizer folder; check the path")
    else:
        tokenizer = _from_hub(path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{path}: has no fast tokenizer (tokenizer.json), which textdiff needs")
    ensure_special_tokens(tokenizer)
    role = mask_role(tokenizer)
    if role is not None:
        raise DataError(
            f"{path}: its mask token {tokenizer.mask_token!r} is its {role} too, which noise would "
            "make of every text; give the mask a token of its own (mask_token in "
            "tokenizer_config.json), or take mask_token out there: one is added then"
        )
    return tokenizer


def auto_tokenizer(path: str | Path, **options: Any) -> Any:
    """Load a tokenizer by transformers, which neither asks for custom code to be run nor runs it.

    Args:
        path: a folder or a hub id.
        **options: of `AutoTokenizer.from_pretrained`.

    Raises:
        Exception: of whatever kind its class raises.
    """
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)


def mask_role(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the other role that the mask token has, in words; None: it has none."""
    mask = tokenizer.mask_token_id
    for role in _ROLES if mask is not None else ():
        if getattr(tokenizer, f"{role}_id") == mask:
            return role.replace("_", " ")
    return None


def prepare_tokenizer(
    section: BpeTokenizer | CharTokenizer | ByteTokenizer | PretrainedTokenizer,
    texts: Iterable[str],
) -> PreTrainedTokenizerFast:
    """Loads or trains the tokenizer that the config asks for.

    Raises:
        DataError: see `load_tokenizer`.
    """
    if isinstance(section, PretrainedTokenizer):
        return load_tokenizer(section.path)
    return train_tokenizer(section, texts)


def ensure_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Adds, in place, a mask token if there is none and a padding token that is not the end.

    An end-of-text token is used where there is one and never added.

    Returns:
        The same tokenizer.
    """
    # The mask first: it then has the id that published checkpoints give it, the vocabulary's size.
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that a model needs: the largest id plus one (`len` is less where ids have gaps)."""
    return int(max(tokenizer.get_vocab().values())) + 1


def excluded_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids that are no clean token, sorted: a model must never predict them.

    These are all special tokens (mask, padding, beginning, separators, the unknown token of
    `char`) and the ids below `vocabulary_size` that name nothing. The end-of-text token is clean,
    and so is the unknown token of a loaded tokenizer: it stands in that tokenizer's encoded text.
    """
    special = special_ids(tokenizer)
    special.discard(tokenizer.eos_token_id)
    if tokenizer.unk_token != UNKNOWN:
        special.discard(tokenizer.unk_token_id)
    gaps = set(range(vocabulary_size(tokenizer))) - set(tokenizer.get_vocab().values())
    return tuple(sorted(special | gaps))


def end_id(tokenizer: PreTrainedTokenizerFast, clean: Tensor) -> int | None:
    """The end-of-text token, if there is one that a model of these clean ids can draw.

    Args:
        tokenizer: the model's.
        clean: [V] bool, ids that it can predict.
    """
    found: int | None = tokenizer.eos_token_id
    return found if found is not None and found < len(clean) and bool(clean[found]) else None


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    """The bytes that each id adds to a text, [vocabulary_size]; None for special tokens and gaps.

    Raises:
        DataError: what a token adds depends on its neighbours, or its decoder is not known here.
    """
    settings = json.loads(serialize(tokenizer))
    kinds = {step["type"] for step in stages(settings.get("decoder"))} or {"none"}
    if kinds <= {"ByteLevel"}:
        table = {name: byte for byte, name in enumerate(byte_characters())}

        def spell(token: str) -> bytes:
            return bytes(table[character] for character in token)
    elif kinds <= {"Fuse", "Replace", "ByteFallback", "Metaspace", "Strip"}:
        pieces = kinds & {"Replace", "Metaspace"}

        def spell(token: str) -> bytes:
            if "ByteFallback" in kinds and BYTE_TOKEN.fullmatch(token):
                return bytes([int(token[3:5], 16)])
            return (token.replace("\u2581", " ") if pieces else token).encode()
    else:
        raise DataError(
            f"what a token of this tokenizer adds to a text is not known ({', '.join(kinds)} "
            "decoder), which patterns and bans need; leave them out"
        )
    added = added_tokens(tokenizer)
    found: list[bytes | None] = [None] * vocabulary_size(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index not in added:
            found[index] = spell(token)
        elif not added[index].special:
            found[index] = token.encode()
    return found


def _bpe(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len((EOS, PAD, MASK)),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in split_long(text, TRAINING_PIECE_CHARACTERS))
    backend.train_from_iterator(pieces, trainer)
    return backend


def _char(texts: Iterable[str]) -> Tokenizer:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocab = {character: index for index, character in enumerate(sorted(characters))}
    vocab[UNKNOWN] = len(vocab)
    # BPE without merges goes character by character and is faster than a regex split.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    backend.decoder = decoders.Fuse()
    return backend


def _byte() -> Tokenizer:
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _from_folder(folder: Path) -> object:
    described = any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json")
    )
    bare_bpe = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not (described or bare_bpe):
        raise DataError(
            f"{folder}: holds no tokenizer; it needs tokenizer.json, or vocab.json and merges.txt"
        )
    try:
        if bare_bpe and not described:  # the original GPT-2 files name no class
            return GPT2TokenizerFast.from_pretrained(str(folder), local_files_only=True)
        return auto_tokenizer(folder, local_files_only=True)
    except Exception as error:  # every tokenizer class fails in its own way
        reason = first_line(error)
        raise DataError(
            f"{folder}: no tokenizer can be loaded from this folder ({reason})"
        ) from None


def _from_hub(name: str) -> object:
    try:
        return auto_tokenizer(name, local_files_only=True)
    except Exception:  # not in the local cache, so ask the hub
        pass
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)  # from_pretrained retries for long
        return auto_tokenizer(name)
    except Exception as error:  # the transport's errors change with the installed HTTP client
        raise DataError(
            f"cannot load the tokenizer {name!r} ({first_line(error)}); check the spelling and "
            "the network, or give a local folder"
        ) from None
