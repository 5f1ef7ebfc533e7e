"""Answers given their prompts under noise that replaces tokens: the loss is the bound."""

import pytest
import torch
from dense_tables import K, kernel, position_nats, sequences, time_grid, world
from exact_tables import CLEAN, MASK, ROWS, TableDenoiser, code, random_table
from talks import END, turn
from talks import sequences as talk_rows

from textdiff.config import Config
from textdiff.loss import PositionTerms
from textdiff.train.batches import TrainingBatches

PROMPT, ANSWER = 0, 2
TEXT = torch.tensor([PROMPT, ANSWER, END])
STEPS = 6


def possible(process: str) -> torch.Tensor:
    """[S] bool: noisy texts that have the prompt as it is and can come from the answer."""
    z = sequences(process, 3)
    each = kernel(process, torch.tensor([0.5]))[1][0, z[:, 1:], TEXT[1:]]  # [S, 2]
    return (z[:, 0] == PROMPT) & (each > 0.0).all(1)


def noisy_answers(process: str, t: torch.Tensor):
    """[R, 3] every noisy text with its prompt at every time, with uniforms that give it, and its
    probability [R] given the time."""
    alpha, matrix = kernel(process, t)
    z = sequences(process, 3)[possible(process)]
    chance = (matrix[:, z[:, 1], ANSWER] * matrix[:, z[:, 2], END]).flatten()  # [R]
    rows = z.repeat(len(t), 1)
    masked = (matrix[:, MASK, ANSWER] / (1.0 - alpha)).repeat_interleave(len(z))[:, None]
    place = torch.tensor([CLEAN.index(s) if s in CLEAN else 0 for s in range(ROWS)])[rows]
    token = torch.where(rows == MASK, 0.0, masked + (1.0 - masked) * (place + 0.5) / K)
    position = (rows == TEXT).double() * (1.0 - 1e-12)
    position[:, 0] = 0.0  # it would be corrupted if it could be
    return rows, position, token, chance


@pytest.mark.parametrize(
    ("process", "kind"),
    [
        ("uniform", "udlm"),
        ("hybrid", "gidd"),
        ("absorbing", "sedd"),
        ("uniform", "sedd"),
        ("uniform", "d3pm"),
    ],
)
def test_the_expected_loss_is_the_bound_given_the_prompt(tmp_path, process, kind):
    steps = STEPS if kind == "d3pm" else None
    family = world(process, kind, timesteps=steps)
    if steps:
        t, weight = torch.arange(1, STEPS + 1).double() / STEPS, torch.full((STEPS,), 1.0 / STEPS)
    else:
        t, weight = time_grid(8)
    rows, position, token, chance = noisy_answers(process, t)
    count = len(rows)
    settings = Config.model_validate(
        {
            "data": {"sequence_length": 3, "conversations": {}},
            "diffusion": {"noise": {"draw": "time"}},
            "train": {"global_batch_size": count, "micro_batch_size": count},
        }
    )
    answers = talk_rows(tmp_path, [[turn([PROMPT], [ANSWER])]], 3, pad=MASK)
    batches = TrainingBatches(answers, family, settings)
    level = t - 0.5 / STEPS if steps else t
    batches.levels = lambda *_: level.repeat_interleave(count // len(t))[:, None]
    batches._uniforms = lambda stream, *_: token if stream.name == "TOKEN" else position
    batch = batches[0]
    assert torch.equal(batch.xt, rows)
    assert torch.equal(batch.x0, TEXT.expand(count, 3))

    generator = torch.Generator().manual_seed(1)
    base, drift = torch.randn(2, ROWS**3, 3, ROWS, generator=generator, dtype=torch.float64)
    network = TableDenoiser(random_table(0), drift)
    network.logits = base
    terms = PositionTerms(network, family, batch).all()
    nats = torch.zeros(count * 3, dtype=torch.float64).index_add(0, batch.positions, terms)
    assert not nats.view(-1, 3)[:, 0].any()
    share = weight.repeat_interleave(count // len(t)) * chance
    expected_loss = float((share * nats.view(-1, 3).sum(1)).sum())

    z = sequences(process, 3)
    sigma = family.network_time(family.known_alpha(family.schedule.alpha(t)))
    rate = -torch.expm1(-sigma.double())
    logits = base[code(z)] + torch.sin(3.0 * rate).view(-1, 1, 1, 1) * drift[code(z)]
    given = position_nats(family, logits, t, TEXT, process)[:, possible(process), 1:]
    per_time = (chance.view(len(t), -1) * given.sum(-1)).sum(1)
    assert expected_loss == pytest.approx(float((weight * per_time).sum()), abs=1e-9)
    assert expected_loss > 0.1
