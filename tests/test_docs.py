"""Check that the documentation and the code agree about configs, names and links."""

import json
import re
import shlex
import tomllib

import pytest
import torch
from noise_calls import noise_by_time
from packaging.version import Version

from textdiff.config.reading import load
from textdiff.diffusion import PROCESSES, SCHEDULES
from textdiff.diffusion.family import Blocks, build_family
from textdiff.diffusion.noise import NoiseUniforms
from textdiff.diffusion.objectives import OBJECTIVES
from textdiff.diffusion.process import Vocabulary
from textdiff.likelihood.estimators import build_estimator, default_estimator


def recipes(root) -> dict[str, list[str]]:
    """Flags of every model of the literature that `docs/objectives.md` names."""
    rows = re.findall(r"^\| (.+?) \| `(--diffusion .+?)`", objectives(root), flags=re.M)
    return {name: shlex.split(flags) for name, flags in rows}


def objectives(root) -> str:
    return (root / "docs" / "objectives.md").read_text()


def test_recipes_are_valid_and_use_every_objective_and_process(root):
    flags_by_name = recipes(root)
    assert len(flags_by_name) >= 12
    configs = {
        name: load(root / "configs" / "shakespeare-char.yaml", flags)
        for name, flags in flags_by_name.items()
    }
    assert {c.diffusion.objective.kind for c in configs.values()} == set(OBJECTIVES)
    assert {c.diffusion.process for c in configs.values()} == set(PROCESSES)


@pytest.mark.parametrize("registry", [OBJECTIVES, PROCESSES, SCHEDULES], ids=["o", "p", "s"])
def test_every_choice_is_explained(root, registry):
    text = objectives(root)
    assert [name for name in registry if f"`{name}`" not in text] == []


def test_every_module_that_the_architecture_names_exists(root):
    page = (root / "docs" / "architecture.md").read_text()
    paths = set(re.findall(r"`((?:textdiff|tests)/[\w./]*)`", page))
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not (root / path).exists()] == []


def test_lower_bounds_are_those_that_are_tested(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    bounds = {re.split(r"[>=<,]+", line)[0]: line for line in project["dependencies"]}
    lines = (root / "tests" / "lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert tested.keys() == bounds.keys()
    for name, version in tested.items():
        assert Version(version) == Version(re.search(r">=([\d.]+)", bounds[name])[1]), name


def test_links_between_pages_lead_somewhere(root):
    for page in [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


PUBLISHED_TIMES = {
    "MDLM (arXiv:2406.07524)": (1e-3, 1.0),
    "SEDD absorb (arXiv:2310.16834)": (1e-3, 1.0),
    "SEDD uniform": (1e-3, 1.0),
    "UDLM (arXiv:2412.10193)": (1e-3, 1.0),
    "GIDD (arXiv:2503.04482)": (1e-4, 1.0 - 1e-4),
    "RADD, lambda-DCE": (0.0, 1.0),
    "LLaDA (arXiv:2502.09992)": (1e-3, 1.0),
}
CONFIGS = {"mdlm-owt-small": "MDLM (arXiv:2406.07524)"}
CONFIGS |= {"sedd-owt-small": "SEDD absorb (arXiv:2310.16834)"}


@pytest.mark.parametrize("name", [*PUBLISHED_TIMES, *CONFIGS])
def test_published_names_draw_the_published_times_and_bound_all_noise(root, name):
    if name in CONFIGS:
        config = load(root / "configs" / f"{name}.yaml")
    else:
        config = load(root / "configs" / "shakespeare-char.yaml", recipes(root)[name])
    diffusion = config.diffusion
    assert diffusion.noise.draw == "time"
    schedule = diffusion.schedule
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    u = torch.full((2, 4), 0.5, dtype=torch.float64)
    noise = noise_by_time(
        schedule, NoiseUniforms(ends, u), Blocks.of(4, None), rates=diffusion.noise.range
    )
    low, high = schedule.t_of_alpha(noise.alpha[:, 0]).tolist()
    assert (low, high) == pytest.approx(PUBLISHED_TIMES[CONFIGS.get(name, name)], rel=1e-3)
    spec = diffusion.model_dump()
    family = build_family(spec, Vocabulary.of(5, 4))
    assert default_estimator(family) == "masked_count"  # which no range reaches
    assert build_estimator("masked_count").missing(family) == ""


def test_masked_losses_of_the_literature_are_options(root):
    """LLaDA: mask rate p uniform on [e, 1], weight 1 / p; lambda-DCE the same from 0."""
    v = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)[1:-1, None]
    for name, low in (("LLaDA (arXiv:2502.09992)", 1e-3), ("RADD, lambda-DCE", 0.0)):
        diffusion = json.loads(recipes(root)[name][1])
        options = diffusion.get("schedule", {"kind": "loglinear"})
        schedule = SCHEDULES.build(options["kind"], options)
        rates = tuple(diffusion["noise"].get("range", (0.0, 1.0)))
        noise = noise_by_time(
            schedule, NoiseUniforms(v, torch.rand(9, 4).double()), Blocks.of(4, None), rates=rates
        )
        rate = low + (1.0 - low) * v
        assert (noise.threshold - rate).abs().max() < 1e-15
        assert (noise.weight * rate - 1.0).abs().max() < 1e-12
