"""Exports as they are written, and records of their origin: code, files and training.

No program is run: the commit is read from the checkout's files. A hash of the package's sources
tells a changed checkout (or an installed wheel) from the commit it started at.
"""

import hashlib
import json
import platform
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
import transformers
import yaml

import textdiff
from textdiff.config import Config
from textdiff.likelihood.bound import Bound
from textdiff.models.configuration import NEEDED
from textdiff.storage import file_hash, whole_folder

PACKAGE = Path(__file__).resolve().parent.parent
TRAINING_FILE = "training.json"


ALONE = {
    "textdiff": f"""\
The network alone loads with transformers {".".join(map(str, NEEDED))} or newer, without textdiff; \
its code is in the folder:

```python
from transformers import AutoModelForMaskedLM

network = AutoModelForMaskedLM.from_pretrained("path/of/this/folder", trust_remote_code=True)
```""",
    "transformers": """\
The folder is an ordinary one of its architecture. `AutoModelForCausalLM`, or
`AutoModelForMaskedLM` for masked language models, loads the network without textdiff.""",
    "adapters": """\
The folder holds low-rank adapters in the format of peft. `base.json` names the weights that they \
belong to, which are loaded with them.""",
}
"""Sentences of a model card about the network without textdiff, by kind of network or export."""


def code_record() -> dict[str, str | None]:
    """Return versions of the libraries, the commit of a checkout (or None) and a source hash."""
    return {
        "textdiff": textdiff.__version__,
        "commit": commit_of(PACKAGE.parent),
        "source_sha256": source_hash(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def model_record(folder: Path | None) -> dict[str, Any]:
    """Return hashes of an export's weights and tokenizer, and which weights they are.

    Args:
        folder: the export; None for a model that was never saved.

    Returns:
        `model_sha256`, `tokenizer_sha256` (None where the file is missing) and `weights`: `ema`,
        `raw`, or `unknown` where the export does not say.
    """
    if folder is None:
        return {"model_sha256": None, "tokenizer_sha256": None, "weights": "unknown"}
    return {
        "model_sha256": file_hash(*sorted(folder.glob("*model*.safetensors"))),
        "tokenizer_sha256": file_hash(folder / "tokenizer.json"),
        "weights": str(training_record(folder).get("weights", "unknown")),
    }


def training_record(folder: Path) -> dict[str, Any]:
    """Return the training record of an export; empty where it is missing or unreadable."""
    try:
        record = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@cache
def source_hash() -> str:
    """Return the SHA-256 of the package's Python files, their names included."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def commit_of(checkout: Path) -> str | None:
    """Return the commit that a checkout is at, read from its `.git`; None where there is none."""
    try:
        directory = _git_directory(checkout / ".git")
        head = (directory / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        return _reference(directory, head.removeprefix("ref: "))
    except (OSError, UnicodeDecodeError):
        return None


def _git_directory(path: Path) -> Path:
    """Return `.git`, or the folder that it names in a worktree or submodule."""
    if path.is_file():
        return path.parent / path.read_text().strip().removeprefix("gitdir: ")
    return path


def _reference(directory: Path, name: str) -> str | None:
    """Return the commit of a branch: in a file of its own, or among the packed ones."""
    common = directory / "commondir"
    roots = [directory]
    if common.is_file():  # a worktree keeps its HEAD and shares the branches
        roots.append(directory / common.read_text().strip())
    for root in roots:
        if (root / name).is_file():
            return (root / name).read_text().strip()
        if (root / "packed-refs").is_file():
            for line in (root / "packed-refs").read_text().splitlines():
                if line.endswith(f" {name}"):
                    return line.split()[0]
    return None


def write_export(
    target: Path,
    save: Callable[[Path], None],
    config: Config,
    state: dict[str, Any],
    bound: Bound | None,
    rescue: str,
) -> None:
    """Write an export beside its place and swap it in, so that no reader sees half of one.

    Args:
        target: the folder.
        save: writes the model and its tokenizer into a folder.
        config: the run's config.
        state: the state of the checkpoint that the weights belong to.
        bound: the newest validation bound.
        rescue: how to continue if writing fails, the end of that sentence.

    Raises:
        CheckpointError: it cannot be written; the earlier export is as it was.
    """
    with whole_folder(target, rescue) as folder:
        save(folder)
        (folder / "README.md").write_text(model_card(config, state, bound), encoding="utf-8")
        record = json.dumps(_training_record(config, state), indent=2, ensure_ascii=False)
        (folder / TRAINING_FILE).write_text(record + "\n", encoding="utf-8")


def _training_record(config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """Return which weights the export holds and what they come from, for later evaluations."""
    decay = config.train.ema_decay
    return {
        "weights": "ema" if decay > 0 else "raw",
        "ema_decay": decay,
        **{key: state[key] for key in ("step", "tokens", "parameters")},
        "seed": config.run.seed,
        "code": code_record(),
        "corpus": state["corpus"],
    }


def model_card(config: Config, state: dict[str, Any], bound: Bound | None) -> str:
    """Return a model card made from the config, the corpus record and the validation bound."""
    family, lora = config.diffusion, config.train.lora
    whole = f"{config.data.sequence_length} (the whole sequence)"
    return filled_card(
        "textdiff.export",
        "model_card.md",
        objective=family.objective.kind,
        process=family.process,
        name=Path(config.run.dir).name,
        blocks=" or ".join(str(size or whole) for size in family.block_sizes),
        length=config.data.sequence_length,
        parameters=f"{state['parameters']:,}",
        tokenizer=config.tokenizer.kind,
        vocabulary=f"{state['vocabulary']:,}",
        sources=", ".join(source.source for source in config.data.sources),
        steps=f"{state['step']:,}",
        tokens=f"{state['tokens']:,}",
        seed=config.run.seed,
        result=_result(bound, averaged=config.train.ema_decay > 0),
        alone=ALONE[config.model.kind if lora is None or lora.merge else "adapters"],
        record=json.dumps(state["corpus"], indent=2, ensure_ascii=False),
    )


def filled_card(
    package: str, card: str, objective: str, process: str, licence: str | None = None, **values: Any
) -> str:
    """Return a template of a model card with values and the hub's metadata in it.

    Args:
        package: the one that has it.
        card: name of the template there.
        objective: kind of the objective.
        process: kind of the process.
        licence: of the weights, by the hub's name; None: not stated.
        **values: by their names in the template.
    """
    front: dict[str, Any] = {
        "library_name": "textdiff",
        "pipeline_tag": "text-generation",
        "tags": ["text-diffusion", objective, process],
    }
    front |= {"license": licence} if licence else {}
    text = files(package).joinpath(card).read_text(encoding="utf-8")
    head = yaml.safe_dump(front, sort_keys=False).strip()
    return Template(text).substitute(front=head, objective=objective, process=process, **values)


def _result(bound: Bound | None, averaged: bool) -> str:
    """Return the validation bound in a sentence."""
    if bound is None:
        return "No validation bound was computed."
    low, high = bound.perplexity_interval()
    interval = (
        f"of unknown error: {bound.doubt}"
        if bound.doubt
        else f"95 % interval {low:.3f} to {high:.3f} of the Monte-Carlo error"
    )
    sign, bits = ("≤" if bound.is_bound else "≈"), bound.bits_per_byte
    per_byte = "" if bits is None else f" {bits:.4f} bits per byte,"
    note = f" Not a bound: {bound.note}." if bound.note else ""
    return (
        f"Validation perplexity {sign} **{bound.perplexity:.3f}** per token ({interval}),"
        f"{per_byte} on {bound.tokens} tokens in {bound.documents} documents; estimator "
        f"`{bound.estimator}`, {bound.replicates} replicates, "
        f"{'averaged' if averaged else 'last'} weights.{note}"
    )
