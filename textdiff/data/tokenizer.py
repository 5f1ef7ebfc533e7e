"""Tokenizers: trained on the corpus (bpe, char, byte) or loaded (any Hugging Face tokenizer).

Trained ones keep their special tokens at the end of the vocabulary and reload through
`AutoTokenizer`. They lose nothing: `decode` of `encode` is the text, for `char` as far as its
characters were seen.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from tokenizers import AddedToken
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from textdiff.data.backend import (
    BYTE_TOKEN,
    added_tokens,
    byte_characters,
    serialize,
    special_ids,
    stages,
)
from textdiff.data.document_stream import brief
from textdiff.data.sections import EOS, MASK, PAD, UNKNOWN, TrainedTokenizer
from textdiff.errors import DataError
from textdiff.storage import refuse_pointers

if TYPE_CHECKING:
    from torch import Tensor

_HUB_TIMEOUT_SECONDS = 10.0
_ROLES = ("eos_token", "unk_token", "pad_token", "bos_token", "sep_token", "cls_token")


def train_tokenizer(section: TrainedTokenizer, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer; equal texts in equal order give an equal tokenizer.

    Args:
        section: the config's tokenizer.
        texts: the training documents; `byte` does not read them.

    Returns:
        A tokenizer whose last ids are `<|endoftext|>`, `<|pad|>` and `<|mask|>` (`char`:
        `<|unk|>` before them).
    """
    backend, unknown = section.backend(texts), section.unknown
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


def pretrained_tokenizer(path: str, mask_token: str | None = None) -> PreTrainedTokenizerFast:
    """Load a Hugging Face tokenizer and give it the special tokens that it lacks.

    Args:
        path: see `load_tokenizer`.
        mask_token: one of its tokens, which becomes the mask; None: its own, else an added one.

    Raises:
        DataError: see `load_tokenizer`; or it lacks the mask token, or that is another special
            token, too.
    """
    tokenizer = load_tokenizer(path)
    if mask_token is not None:
        _use_as_mask(tokenizer, mask_token, path)
    ensure_special_tokens(tokenizer)
    role = mask_role(tokenizer)
    if role is not None:
        raise DataError(
            f"{path}: its mask token {tokenizer.mask_token!r} is its {role} too, and noise would "
            "replace text by it; give the mask a token of its own (mask_token in "
            "tokenizer_config.json), or remove mask_token there: one is added then",
            code="mask_role",
        )
    return tokenizer


def _use_as_mask(tokenizer: PreTrainedTokenizerFast, mask_token: str, path: str) -> None:
    """Make a token the mask, in place, without adding one."""
    if mask_token not in tokenizer.get_vocab():
        own = tokenizer.mask_token
        advice = f"its own is {own!r}" if own else "it has no mask: null adds one"
        raise DataError(
            f"tokenizer.mask_token {mask_token!r}: {path} has no such token, and none is added for "
            f"it; name one that it has, such as a reserved one, or null ({advice})",
            code="unknown_mask",
        )
    tokenizer.add_special_tokens({"mask_token": mask_token})


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Load a Hugging Face tokenizer as it is.

    Args:
        path: a folder (also one with only `vocab.json` and `merges.txt`) or a hub id.

    Raises:
        DataError: the tokenizer does not exist, or has no fast implementation.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        refuse_pointers(folder, DataError)
        tokenizer = _from_folder(folder)
    elif folder.exists():
        raise DataError(
            f"{path} is a file; give the folder that holds the tokenizer files", code="file"
        )
    elif path.startswith((".", "~", "/")) or path.count("/") > 1:
        raise DataError(f"{path}: no such tokenizer folder; check the path", code="no_folder")
    else:
        tokenizer = _from_hub(path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"{path}: has no fast tokenizer (tokenizer.json), which textdiff needs", code="slow"
        )
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        # Some classes of transformers load without a file.
        raise DataError(
            f"{path}: its tokenizer has special tokens alone; the files of its vocabulary are "
            "missing (tokenizer.json)",
            code="no_tokenizer",
        )
    return tokenizer


def auto_tokenizer(path: str | Path, **options: Any) -> Any:
    """Load a tokenizer by transformers, without running custom code or asking to run it.

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


def ensure_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Add, in place, a mask token if there is none and a padding token that is not the end.

    An end-of-text token is used where there is one and never added.

    Returns:
        The same tokenizer.
    """
    # The mask first: it then has the id that published checkpoints give it, the vocabulary's size.
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": _fresh(tokenizer, MASK)})
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": _fresh(tokenizer, PAD)})
    return tokenizer


def _fresh(tokenizer: PreTrainedTokenizerFast, token: str) -> str:
    """Return a token that the tokenizer lacks: one it has may have another meaning."""
    known, number = tokenizer.get_vocab(), 1
    name = token
    while name in known:
        number += 1
        name = token.replace("|>", f"_{number}|>")
    return name


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the rows that a model needs: the largest id plus one (ids may have gaps)."""
    return int(max(tokenizer.get_vocab().values())) + 1


def excluded_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the ids that are not clean tokens, sorted: a model must never predict them.

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


def end_id(tokenizer: PreTrainedTokenizerFast, clean: "Tensor") -> int | None:
    """Return the end-of-text token, if there is one that a model of these clean ids can draw.

    Args:
        tokenizer: the model's.
        clean: [V] bool, ids that it can predict.
    """
    end: int | None = tokenizer.eos_token_id
    return end if end is not None and end < len(clean) and bool(clean[end]) else None


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    """Return the bytes that each id adds to a text; None for special tokens and gaps.

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
        has_spaces = bool(kinds & {"Replace", "Metaspace"})

        def spell(token: str) -> bytes:
            if "ByteFallback" in kinds and BYTE_TOKEN.fullmatch(token):
                return bytes([int(token[3:5], 16)])
            return (token.replace("\u2581", " ") if has_spaces else token).encode()
    else:
        raise DataError(
            f"what a token of this tokenizer adds to a text is not known ({', '.join(kinds)} "
            "decoder), which patterns and bans need; leave them out",
            code="unknown_decoder",
        )
    added = added_tokens(tokenizer)
    spelled: list[bytes | None] = [None] * vocabulary_size(tokenizer)  # [V]
    for token, index in tokenizer.get_vocab().items():
        if index not in added:
            spelled[index] = spell(token)
        elif not added[index].special:
            spelled[index] = token.encode()
    return spelled


def _from_folder(folder: Path) -> object:
    names = ("tokenizer.json", "tokenizer_config.json", "config.json")
    described = any((folder / name).is_file() for name in names)
    bare_bpe = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not (described or bare_bpe):
        raise DataError(
            f"{folder}: holds no tokenizer; it needs tokenizer.json, or vocab.json and merges.txt",
            code="no_tokenizer",
        )
    try:
        if bare_bpe and not described:  # the original GPT-2 files name no class
            return GPT2TokenizerFast.from_pretrained(str(folder), local_files_only=True)
        return auto_tokenizer(folder, local_files_only=True)
    except Exception as error:  # every tokenizer class fails in its own way
        raise DataError(
            f"{folder}: no tokenizer can be loaded from this folder ({brief(error)})",
            code="not_loaded",
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
            f"cannot load the tokenizer {name!r} ({brief(error)}); check the spelling and the "
            "network, or give a local folder",
            code="not_loaded",
        ) from None
