"""The export directory: everything inference reads, nothing else."""

import json
from pathlib import Path
from typing import Any

import yaml

from textdiff.config import Config
from textdiff.export.provenance import code_record
from textdiff.likelihood import Bound
from textdiff.models.configuration import NEEDED


def training_facts(config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """Which weights the export holds and what they come from, for whoever evaluates it."""
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
    """A model card filled from the config, the corpus record and the validation bound."""
    family = config.diffusion
    front = {
        "library_name": "textdiff",
        "pipeline_tag": "text-generation",
        "tags": ["text-diffusion", family.objective.kind, family.process],
    }
    result = "No validation bound was computed."
    if bound is not None:
        low, high = bound.perplexity_interval()
        interval = (
            f"of unknown error: {bound.doubt}"
            if bound.doubt
            else f"95 % interval {low:.3f} to {high:.3f} of the Monte-Carlo error"
        )
        weights = "averaged" if config.train.ema_decay > 0 else "last"
        sign, bits = ("≤" if bound.is_bound else "≈"), bound.bits_per_byte
        per_byte = "" if bits is None else f" {bits:.4f} bits per byte,"
        result = (
            f"Validation perplexity {sign} **{bound.perplexity:.3f}** per token ({interval}),"
            f"{per_byte} on {bound.tokens} tokens in {bound.documents} documents; estimator "
            f"`{bound.estimator}`, {bound.replicates} replicates, {weights} weights."
            + (f" Not a bound: {bound.note}." if bound.note else "")
        )
    sources = ", ".join(source.source for source in config.data.sources)
    whole = f"{config.data.sequence_length} (the whole sequence)"
    blocks = " or ".join(str(size or whole) for size in family.block_sizes)
    oldest = ".".join(map(str, NEEDED))
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {Path(config.run.dir).name}

A discrete text-diffusion language model trained with textdiff.

| | |
|---|---|
| objective | {family.objective.kind}, {family.process} process |
| block size | {blocks} |
| sequence length | {config.data.sequence_length} tokens |
| parameters | {state["parameters"]:,} |
| tokenizer | {config.tokenizer.kind}, {state["vocabulary"]:,} ids |
| corpus | {sources} |
| training | {state["step"]:,} steps, {state["tokens"]:,} tokens, seed {config.run.seed} |

## Result

{result}

## Use

```python
from textdiff import TextDiffusion

model = TextDiffusion.from_pretrained("path/of/this/folder")
print(model.generate("", num_samples=1).texts[0])
```

The network alone loads with transformers {oldest} or newer, without textdiff; its code is in the
folder:

```python
from transformers import AutoModelForMaskedLM

network = AutoModelForMaskedLM.from_pretrained("path/of/this/folder", trust_remote_code=True)
```

## Corpus record

```json
{json.dumps(state["corpus"], indent=2, ensure_ascii=False)}
```
"""
