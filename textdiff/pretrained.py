"""Language models of transformers as others publish them: located and checked, never their code.

A folder or a hub id stands for a model whose `config.json` names an architecture that transformers
has. Refused with a sentence: architectures that are code in the repository, quantised weights,
GGUF files, and models that are neither causal nor masked language models.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.errors import CheckpointError, first_line
from textdiff.storage import refuse_pointers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_HUB_TIMEOUT_SECONDS = 10.0
CONFIG = "config.json"


def pretrained_configuration(path: str) -> "PreTrainedConfig":
    """Return the configuration of a causal or masked language model.

    Args:
        path: a folder or a hub id.

    Raises:
        CheckpointError: there is none, or none that textdiff can use.
    """
    from transformers import AutoConfig

    folder = pretrained_folder(path)
    raw = _read(folder / CONFIG, path)
    problem = refusal(raw)
    if problem is not None:
        code, reason = problem
        raise CheckpointError(f"{path}: {reason}", code=code)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever a configuration's own checks raise
        raise CheckpointError(
            f"{path}: {CONFIG} is not valid ({first_line(error)})", code="invalid_config"
        ) from None
    if hasattr(config, "auto_map"):  # transformers has the architecture; copies name no code
        del config.auto_map
    return config


def refusal(raw: dict[str, Any]) -> tuple[str, str] | None:
    """Return why a model with this `config.json` cannot be used: a code and a sentence's end."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = raw.get("model_type")
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    if raw.get("quantization_config") or raw.get("compression_config"):
        return "quantized", (
            "its weights are quantised and cannot be trained; take the model that it was made from"
        )
    if kind not in known and raw.get("auto_map"):
        return "remote_code", (
            f"its architecture {kind!r} is code in the repository, which is never run; take a "
            "model whose architecture transformers has, such as qwen3 or llama"
        )
    if kind not in known or raw.get("is_encoder_decoder") or "text_config" in raw:
        return "no_language_model", (
            f"{kind!r} is not a causal or masked language model of transformers; take one such as "
            "qwen3, llama or modernbert"
        )
    return None


def pretrained_folder(path: str) -> Path:
    """Return the folder that holds a model's `config.json`, from the local cache or the hub.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path).expanduser()
    if folder.suffix == ".gguf" or path.lower().endswith("-gguf"):
        raise _gguf(path)
    if folder.is_dir():
        refuse_pointers(folder, CheckpointError)
        refuse_gguf(folder)
        if not (folder / CONFIG).is_file():
            raise _without_config(path, [file.name for file in folder.iterdir()])
        return folder
    if folder.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds it", code="file")
    if path.startswith((".", "~", "/")) or path.count("/") > 1:
        raise CheckpointError(f"{path}: no such folder; check the path", code="no_folder")
    return _cached(path) or _fetched(path)


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, CONFIG)
    except ValueError:  # no possible id
        return None
    return Path(file).parent if isinstance(file, str) else None


def _fetched(name: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    try:  # one question first: downloads retry for long
        facts = HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
        names = [each.rfilename for each in facts.siblings or ()]
        if CONFIG not in names:
            raise _without_config(name, names)
        return Path(hf_hub_download(name, CONFIG)).parent
    except CheckpointError:
        raise
    except Exception as error:  # the transport's errors change with the installed HTTP client
        raise CheckpointError(
            f"cannot load the model {name!r} from the hub ({first_line(error)}); check the "
            "spelling and the network, or give a local folder",
            code="hub",
        ) from None


def _read(file: Path, path: str) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {CONFIG} cannot be read ({first_line(error)})", code="invalid_config"
        ) from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: {CONFIG} holds no JSON object", code="invalid_config")
    return raw


def _without_config(path: str, names: Sequence[str]) -> CheckpointError:
    if any(name.lower().endswith(".gguf") for name in names):
        return _gguf(path)
    return CheckpointError(
        f"{path}: holds no {CONFIG}, which names the architecture", code="no_config"
    )


def refuse_gguf(folder: Path) -> None:
    """Refuse a folder whose only weights are GGUF files.

    Raises:
        CheckpointError: with the way to convert them.
    """
    kinds = {file.suffix.lower() for file in folder.iterdir()}
    if ".gguf" in kinds and not kinds & {".safetensors", ".bin"}:
        raise _gguf(str(folder))


def _gguf(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: GGUF files hold quantised weights of another layout; convert them once in "
        "Python: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE)"
        ".save_pretrained(COPY), and the tokenizer likewise",
        code="gguf",
    )
