"""The mask that a folder's tokenizer files name, read without loading a tokenizer."""

import json
from pathlib import Path
from typing import Any


def stored_mask(folder: Path) -> int | None:
    """Return the id of the mask token by a folder's tokenizer files; None: they name none.

    Files may spell it in several ways, with one id: the file that names the mask comes first.
    """
    settings = _content(folder / "tokenizer_config.json")
    named = settings.get("mask_token")
    spelled = named.get("content") if isinstance(named, dict) else named
    if not isinstance(spelled, str):
        return None
    decoder = settings.get("added_tokens_decoder") or {}
    ids = [int(key) for key, token in decoder.items() if _text(token) == spelled]
    backend = _content(folder / "tokenizer.json")
    ids += [token["id"] for token in backend.get("added_tokens", ()) if _text(token) == spelled]
    for names in (_content(folder / "added_tokens.json"), _content(folder / "vocab.json")):
        ids += [names[spelled]] if isinstance(names.get(spelled), int) else []
    vocabulary = (backend.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict) and spelled in vocabulary:
        ids.append(vocabulary[spelled])
    return ids[0] if ids else None


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _content(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
