"""What the documentation says can be configured can be configured."""

import json
import re
import shlex

import pytest
import torch

from textdiff.config_file import load
from textdiff.diffusion.blocks import Blocks
from textdiff.diffusion.noise import noise_by_time
from textdiff.diffusion.objectives import OBJECTIVES
from textdiff.diffusion.process import PROCESSES
from textdiff.diffusion.schedule import SCHEDULES, build_schedule


def recipes(root) -> dict[str, list[str]]:
    """Flags of every model of the literature that `docs/objectives.md` names."""
    rows = re.findall(r"^\| (.+?) \| `(--diffusion .+?)`", objectives(root), flags=re.M)
    return {name: shlex.split(flags) for name, flags in rows}


def objectives(root) -> str:
    return (root / "docs" / "objectives.md").read_text()


def test_recipes_are_valid_and_use_every_objective_and_process(root):
    found = recipes(root)
    assert len(found) >= 12
    configs = {
        name: load(root / "configs" / "shakespeare-char.yaml", flags)
        for name, flags in found.items()
    }
    assert {c.diffusion.objective.kind for c in configs.values()} == set(OBJECTIVES)
    assert {c.diffusion.process for c in configs.values()} == set(PROCESSES)


@pytest.mark.parametrize("registry", [OBJECTIVES, PROCESSES, SCHEDULES], ids=["o", "p", "s"])
def test_every_choice_is_explained(root, registry):
    text = objectives(root)
    assert [name for name in registry if f"`{name}`" not in text] == []


def test_masked_losses_of_the_literature_are_options(root):
    """LLaDA: mask rate p uniform on [e, 1], weight 1 / p; lambda-DCE the same from 0."""
    v = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)[1:-1, None]
    for name, low in (("LLaDA (arXiv:2502.09992)", 1e-3), ("RADD, lambda-DCE", 0.0)):
        diffusion = json.loads(recipes(root)[name][1])
        schedule = build_schedule(**diffusion.get("schedule", {"kind": "loglinear"}))
        rates = tuple(diffusion["noise"].get("range", (0.0, 1.0)))
        noise = noise_by_time(
            schedule, v, torch.rand(9, 4).double(), Blocks.of(4, None), None, rates
        )
        rate = low + (1.0 - low) * v
        assert (noise.threshold - rate).abs().max() < 1e-15
        assert (noise.weight * rate - 1.0).abs().max() < 1e-12
