"""Every combination of the choices: refused with the key to change, or trained, scored and run."""

import itertools
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import yaml
from engines import generate
from refusals import refused

from textdiff.config import Config
from textdiff.config.reading import validate
from textdiff.data.sections import CharTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.diffusion import PROCESSES, SCHEDULES
from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import OBJECTIVES
from textdiff.errors import ConfigError
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.models import TextDiffusionModel
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job
from textdiff.train.batches import TrainingBatches
from textdiff.train.learned_loss import training_loss
from textdiff.train.setup import build_model

TEXT = "a text is a row of words; "
LENGTH, ROWS = 8, 4
OBJECTIVE_OPTIONS = {
    "mdlm": (
        "loss_weight=elbo",
        "loss_weight=ce",
        "loss_weight=clipped",
        "shift=true",
        "ar_weight=0.2",
    ),
    "d3pm": ("parameterization=mixture", "parameterization=plugged", "auxiliary=0.01"),
    "sedd": ("scaled=true", "shift=true"),
    "udlm": ("shift=false", "ar_weight=0.2"),
    "gidd": ("loss_weight=elbo", "loss_weight=clipped", "loss_weight=dynamic"),
}
AXES = {
    "process": tuple(PROCESSES),
    "schedule": tuple(SCHEDULES),
    "objective": tuple(
        " ".join((kind, option)).strip()
        for kind in OBJECTIVES
        for option in OBJECTIVE_OPTIONS.get(kind, ("",))
    ),
    "block_size": (None, 4, 1),
    "timesteps": (None, 5),
    "noise.draw": ("count", "time"),
    "noise.complementary": (False, True),
    "time_conditioning": (False, True),
}
Choice = tuple[str | int | bool | None, ...]


def raw(choice: Choice) -> dict:
    """The config that makes one choice on every axis."""
    process, schedule, objective, block_size, timesteps, draw, pairs, conditioning = choice
    kind, _, option = str(objective).partition(" ")
    name, _, value = option.partition("=")
    options = {name: yaml.safe_load(value)} if option else {}
    return {
        "data": {"sequence_length": LENGTH},
        "tokenizer": {"kind": "char"},
        "model": {
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "adaln": conditioning,
            "time_conditioning": conditioning,
        },
        "diffusion": {
            "process": process,
            "schedule": {"kind": schedule},
            "objective": {"kind": kind, **options},
            "noise": {"draw": draw, "complementary": pairs},
            "block_size": block_size,
            "timesteps": timesteps,
        },
        "train": {"global_batch_size": ROWS, "micro_batch_size": ROWS},
        "sample": {"max_new_tokens": 4},
    }


@cache
def verdict(choice: Choice) -> Config | str:
    """The config, or why it is refused."""
    try:
        return validate(raw(choice))
    except ConfigError as error:
        return str(error)


def choices(process: str, objective: str) -> Iterator[Choice]:
    others = [AXES[name] for name in AXES if name not in ("process", "objective")]
    for schedule, *rest in itertools.product(*others):
        yield (process, schedule, objective, *rest)


# mdlm has the most options; the others' twins differ from them in what mdlm covers, too.
SLOW = ("mdlm", "sedd shift", "udlm ar_weight")
PAIRS = list(itertools.product(AXES["process"], AXES["objective"]))
DEFINED = [(p, o) for p, o in PAIRS if p in OBJECTIVES[o.split()[0]].processes]


@cache
def tokenizer():
    return train_tokenizer(CharTokenizer(), [TEXT])


def encoded() -> torch.Tensor:
    return torch.tensor(tokenizer().encode(TEXT * ROWS))


def network(config: Config) -> tuple[TextDiffusionModel, Family]:
    """A network whose every parameter is random."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model, family = build_model(config, tokenizer(), torch.device("cpu"))
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), family


def trained(model: TextDiffusionModel, family: Family, config: Config) -> None:
    tokens = encoded()[: ROWS * LENGTH].view(ROWS, LENGTH).numpy()
    rows = SimpleNamespace(rows=lambda samples: SimpleNamespace(tokens=tokens, documents=None))
    loss, nelbo = training_loss(model, family)(TrainingBatches(rows, family.on_cpu, config)[0])
    assert loss.isfinite(), f"loss {loss}"
    assert nelbo.isfinite(), f"bound {nelbo}"
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in grads.items():
        assert grad.isfinite().all(), f"gradient of {name}"
    assert any(name.startswith("output_layer") and g.any() for name, g in grads.items())
    assert any(name.startswith("vocab_embed") and g.any() for name, g in grads.items())
    assert (family.learned is None) == ("exponents.raw" not in grads)


def scored(model: TextDiffusionModel, family: Family) -> None:
    tokens, clean = encoded(), family.process.vocabulary.clean
    texts = [tokens[:13], tokens[:3]] * 4  # one text alone has many more replicates
    arrays = [text.to(torch.int32).numpy() for text in texts]
    windows = cut_windows(arrays, ["x" * len(text) for text in texts], LENGTH, clean)
    bound = estimate(model, family, windows, seed=0, replicates=8).bound()
    assert torch.tensor([bound.mean, bound.stderr]).isfinite().all(), f"bound {bound}"
    assert 0.0 < bound.mean < 30.0, f"bound {bound}"
    assert bound.tokens == 64


def generated(model: TextDiffusionModel, family: Family) -> None:
    prompt = encoded()[:2].tolist()
    job = Job([[], prompt, prompt], [LENGTH, LENGTH - 2, 1])
    *_, last = generate(model, family, job, rule="ancestral", steps=4, controls=Controls())
    for row, length in zip(last.canvas, job.lengths.tolist(), strict=True):
        assert family.process.vocabulary.clean[row[:length]].all(), f"generated {row.tolist()}"
    assert last.canvas[1, :2].tolist() == prompt


def only_training_differs(choice: Choice) -> bool:
    """Return whether another choice has the same network, bound and texts, and is accepted.

    The noise maker and the weights of the loss act on training alone.
    """
    process, schedule, objective, block_size, timesteps, _, pairs, conditioning = choice
    kind, _, option = str(objective).partition(" ")
    if pairs:
        return True  # without them it is accepted, too
    if option.startswith(("loss_weight", "auxiliary")):
        objective = f"{kind} {OBJECTIVE_OPTIONS[kind][0]}"
    choices = [
        (process, schedule, objective, block_size, timesteps, draw, False, conditioning)
        for draw in AXES["noise.draw"]
    ]
    twin = next(filter(accepted, choices), choice)
    return twin != choice


@pytest.mark.parametrize(
    ("process", "objective"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if pair[1].startswith(SLOW) else ())
        for pair in DEFINED
    ],
)
def test_what_is_accepted_trains_scores_and_generates(process, objective):
    accepted = 0
    for choice in choices(process, objective):
        config = verdict(choice)
        if isinstance(config, str):
            continue
        accepted += 1
        try:
            model, family = network(config)
            trained(model, family, config)
            if not only_training_differs(choice):
                scored(model, family)
                generated(model, family)
        except Exception as error:
            raise AssertionError(f"{dict(zip(AXES, choice, strict=True))}: {error}") from error
    assert accepted, "the objective is defined for the process, so some config must have both"


@pytest.mark.parametrize(("process", "objective"), DEFINED)
def test_networks_may_read_their_own_prediction(process, objective):
    """Of every objective one choice for each block size and each number of masks."""
    walked = set()
    for choice in choices(process, objective):
        config, place = verdict(choice), (choice[3], choice[6])
        if isinstance(config, str) or place in walked:
            continue
        walked.add(place)
        given = raw(choice)
        given["model"]["self_conditioning"] = True
        if config.diffusion.objective.shifted:
            with refused(ConfigError, None, "model.self_conditioning: false"):
                validate(given)
            continue
        model, family = network(validate(given))
        trained(model, family, validate(given))
        assert model.self_conditioning.mlp[0].weight.grad.any()
        if not choice[6]:
            scored(model, family)
            generated(model, family)
    assert walked


@pytest.mark.parametrize(("process", "objective"), PAIRS)
def test_what_is_refused_names_the_keys_to_change(process, objective):
    """Another choice under the named keys alone is accepted, or has something else wrong."""
    for choice in choices(process, objective):
        reason = verdict(choice)
        if not isinstance(reason, str):
            continue
        assert reason.startswith("config: ")
        assert len(reason) > 40, reason
        named = [name for name in AXES if name in reason]
        assert named, reason
        others = itertools.product(
            *(
                values if name in named else (chosen,)
                for (name, values), chosen in zip(AXES.items(), choice, strict=True)
            )
        )
        assert any(verdict(other) != reason for other in others), reason


def test_following_the_advice_ends_at_a_config():
    """From anywhere, changing named keys leads to an accepted config within three rounds."""
    reached = {choice for choice in itertools.product(*AXES.values()) if accepted(choice)}
    assert 300 < len(reached) < 1000
    for _ in range(3):
        for choice in set(itertools.product(*AXES.values())) - reached:
            reason = verdict(choice)
            assert isinstance(reason, str)
            for at, name in enumerate(AXES):
                changed = ((*choice[:at], v, *choice[at + 1 :]) for v in AXES[name])
                if name in reason and any(other in reached for other in changed):
                    reached.add(choice)
                    break
    lost = set(itertools.product(*AXES.values())) - reached
    assert not lost, f"{len(lost)} such as {next(iter(lost))}: {verdict(next(iter(lost)))}"


def accepted(choice: Choice) -> bool:
    return isinstance(verdict(choice), Config)


def test_every_process_schedule_and_objective_is_accepted_somewhere():
    found = [choice for choice in itertools.product(*AXES.values()) if accepted(choice)]
    for at, (name, values) in enumerate(AXES.items()):
        assert {choice[at] for choice in found} == set(values), name


def test_refused_processes_are_those_that_objectives_are_not_defined_for():
    for kind, objective in OBJECTIVES.items():
        refused = {process for process in PROCESSES if _refuses_process(kind, process)}
        assert set(PROCESSES) - refused == set(objective.processes), kind


def _refuses_process(kind: str, process: str) -> bool:
    objective = next(o for o in AXES["objective"] if o.split()[0] == kind)
    reasons = [verdict(choice) for choice in choices(process, objective)]
    return all(isinstance(r, str) and f"with process {process}" in r for r in reasons)
