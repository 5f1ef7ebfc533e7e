"""A class that one file registers is a choice everywhere: nothing else had to change.

Each toy below is written to a temporary file, as a user would write it, and imported. A model is
then trained, exported, scored and made to generate by the command line with the toy chosen.
"""

import importlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from textdiff.cli import main
from textdiff.config.reading import load
from textdiff.errors import CheckpointError, ConfigError

OBJECTIVE_AND_SCHEDULE = '''
from typing import ClassVar, Literal

from pydantic import Field

from textdiff.diffusion import SCHEDULES
from textdiff.diffusion.objectives import OBJECTIVES, Objective
from textdiff.diffusion.objectives.objective import pick
from textdiff.diffusion.schedule import NoiseSchedule


@SCHEDULES.register
class ToyPower(NoiseSchedule):
    """alpha(t) = 1 - t ** power."""

    kind: Literal["toy_power"] = "toy_power"
    power: float = Field(1.5, gt=0.0, description="power of time")

    def alpha(self, t):
        return 1.0 - t**self.power

    def dalpha(self, t):
        return -self.power * t ** (self.power - 1.0)

    def t_of_alpha(self, alpha):
        return (1.0 - alpha) ** (1.0 / self.power)


@OBJECTIVES.register
class ToyEntropy(Objective):
    """Cross-entropy at masked positions, larger in training."""

    kind: Literal["toy_entropy"] = "toy_entropy"
    scale: float = Field(2.0, gt=0.0, description="what training multiplies the bound with")

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    reason: ClassVar[str] = "it reads masks"
    heavy_tailed: ClassVar[bool] = False

    def nelbo_terms(self, prediction, x0, xt, noise):
        return -(noise.weight * pick(prediction.log_x0, x0))

    def loss_terms(self, nelbo, prediction, x0, xt, noise):
        return self.scale * nelbo
'''

SOURCE = '''
from typing import Literal

from textdiff.data.document_stream import from_texts
from textdiff.data.sources import SOURCES, SourceKind


@SOURCES.register
class ToySource(SourceKind):
    """`toy:WORD`, documents that count a word."""

    kind: Literal["toy"] = "toy"

    def load(self, source, omissions):
        word = source.source.partition(":")[2]
        return from_texts(f"{word} number {n}, of sixty." for n in range(60))
'''

RULE = '''
from typing import Literal

import torch

from textdiff.sampling.rules import RULES, Rule


@RULES.register
class ToyRule(Rule):
    """Reveals everything at once."""

    kind: Literal["toy_rule"] = "toy_rule"
    processes = ("absorbing",)

    def __call__(self, segment):
        positions = (~segment.frozen).flatten().nonzero().squeeze(1)
        yield segment.reveal(positions, torch.ones(len(segment.frozen), dtype=torch.float64))
'''

ESTIMATOR = '''
from typing import Literal

from textdiff.likelihood.estimators import ESTIMATORS


@ESTIMATORS.register
class ToyEstimator(ESTIMATORS["masked_count"]):
    """Masked counts by another name."""

    kind: Literal["toy_estimator"] = "toy_estimator"
'''


@dataclass(frozen=True)
class Toy:
    """A file that registers something, and the words that choose it.

    Attributes:
        code: the file.
        registries: `module:NAME` of each registry that it adds to.
        config: sections and keys of the training config.
        train, perplexity, generate: flags of these verbs.
    """

    code: str
    registries: Sequence[str]
    config: dict[str, Any] = field(default_factory=dict)
    train: Sequence[str] = ()
    perplexity: Sequence[str] = ()
    generate: Sequence[str] = ()


TOYS = {
    "objective and schedule": Toy(
        OBJECTIVE_AND_SCHEDULE,
        ["textdiff.diffusion:SCHEDULES", "textdiff.diffusion.objectives:OBJECTIVES"],
        {"diffusion": {"objective": {"kind": "toy_entropy", "scale": 3.0}}},
        ["--diffusion.schedule.kind", "toy_power", "--diffusion.noise.draw=time"],
    ),
    "source": Toy(
        SOURCE,
        ["textdiff.data.sources:SOURCES"],
        {"data": {"sources": [{"source": "toy:word"}], "sequence_length": 16, "validation": 0.2}},
    ),
    "rule": Toy(
        RULE,
        ["textdiff.sampling.rules:RULES"],
        train=["--sample.rule", "toy_rule"],
        generate=["--rule", "toy_rule"],
    ),
    "estimator": Toy(
        ESTIMATOR,
        ["textdiff.likelihood.estimators:ESTIMATORS"],
        perplexity=["--estimator", "toy_estimator"],
    ),
}


@pytest.fixture(params=TOYS)
def toy(request, tmp_path, monkeypatch) -> Toy:
    """Import a toy's file; what it registers is gone after the test."""
    chosen = TOYS[request.param]
    for name in chosen.registries:
        module, _, attribute = name.partition(":")
        registry = getattr(importlib.import_module(module), attribute)
        monkeypatch.setattr(registry, "_members", dict(registry))
    imported(tmp_path / "toy.py", chosen.code)
    return chosen


def imported(path: Path, code: str) -> None:
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("toy", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def written(folder: Path, sections: dict[str, Any]) -> Path:
    """Write the config of a tiny run; `sections` are added to it."""
    text = folder / "text.txt"
    text.write_text("".join(f"line {n} of a small text.\n\n" for n in range(60)))
    config = {
        "run": {"dir": str(folder / "run")},
        "data": {"sources": [{"source": str(text)}], "sequence_length": 16, "validation": 0.2},
        "tokenizer": {"kind": "byte"},
        "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
        "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 4, "warmup_steps": 0},
        "evaluate": {"every": 2, "max_documents": 2},
        "sample": {"steps": 2, "max_new_tokens": 4, "num_samples": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | sections))
    return path


def test_what_is_registered_trains_is_scored_and_generates(toy, tmp_path, capsys):
    path = written(tmp_path, toy.config)
    assert main(["train", str(path), *toy.train]) == 0
    export, text = str(tmp_path / "run" / "export"), str(tmp_path / "text.txt")
    capsys.readouterr()
    words = [text, "--max-documents", "2", "--json", *toy.perplexity]
    assert main(["perplexity", export, *words]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1.0
    words = ["line", "--max-new-tokens", "4", "--json", *toy.generate]
    assert main(["generate", export, *words]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("toy", ["objective and schedule"], indirect=True)
def test_what_is_registered_is_in_help_suggestions_and_refusals(toy, tmp_path, capsys):
    path = written(tmp_path, toy.config)
    assert main(["train", str(path), *toy.train, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Cross-entropy at masked positions, larger in training. (mdlm" in shown
    assert "ar | toy_entropy)" in shown
    assert "--diffusion.schedule.power 1.5 power of time" in shown
    for flag, said in [
        ("--diffusion.objective.scal=1", "did you mean --diffusion.objective.scale?"),
        ("--diffusion.objective.scale=0", "--diffusion.objective.scale: Input should be greater"),
        ("--diffusion.objective.kind=toy", "it must be one of 'mdlm'"),
        ("--diffusion.process=uniform", "toy_entropy does not go with process uniform (it reads"),
        ("--diffusion.timesteps=5", "objective toy_entropy is in continuous time"),
    ]:
        with pytest.raises(ConfigError) as error:
            load(path, [*toy.train, flag])
        assert said in str(error.value)


def test_exports_of_what_is_not_registered_are_refused_with_the_list(tmp_path, monkeypatch):
    from textdiff.diffusion.objectives import OBJECTIVES
    from textdiff.pipeline import TextDiffusion

    assert main(["train", str(written(tmp_path, {}))]) == 0
    folder = tmp_path / "run" / "export"
    saved = json.loads((folder / "config.json").read_text())
    saved["diffusion"]["objective"]["kind"] = "mdml"
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError) as error:
        TextDiffusion.from_pretrained(folder, device="cpu")
    assert error.value.code == "unknown_objective"
    assert "did you mean 'mdlm'?" in str(error.value)
    assert ", ".join(OBJECTIVES) in str(error.value)
