"""Decoding rules run on tables: four tokens of three kinds, and the exact law of what comes out."""

import torch
from exact_tables import CLEAN, MASK, ROWS, Table, all_sequences, code, family, random_joint
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.sampling.context import Context
from textdiff.sampling.controls import Controls
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import Rule
from textdiff.sampling.segment import Segment
from textdiff.sampling.step import Step

LENGTH = 4


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())


def keyed(rows: Tensor | int, length: int, seed: int = 0):
    """Uniforms as a generation has them: keyed by row, step and position."""
    rows = torch.arange(rows) if isinstance(rows, int) else rows

    def draw(stream: Stream, step: int) -> Tensor:
        return uniforms(seed, stream, row=rows[:, None], step=step, position=torch.arange(length))

    return draw


def reader(table: Table):
    """A time-free network that reads a table, and refuses to predict what is not masked."""

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        rows, where = positions.row, positions.column
        assert (canvas.flatten()[positions.flat] == MASK).all()
        return Prediction(table.log_p[code(canvas)[rows], where])

    return denoise


def run(rule: Rule, denoise, canvas: Tensor, draws, steps: int, chosen=None, **rest) -> list[Step]:
    chosen = chosen or family()
    options = {"frozen": torch.zeros_like(canvas, dtype=torch.bool), "controls": Controls(), **rest}
    return list(
        rule(
            Segment(
                denoise,
                chosen.process,
                chosen.schedule,
                canvas,
                steps=steps,
                uniforms=draws,
                **options,
            )
        )
    )


def forced(
    rule: Rule, table: Table, steps: int, seed: int = 0, controls: Controls | None = None
) -> tuple[Tensor, Tensor]:
    """Probability of every text under a rule that reveals each position once, by its own walk.

    One row per text. Whatever the network says, the token's uniform is put in the middle of the
    interval that the row's text owns, so every walk ends at its text; its probability is the
    product of those intervals. Positions may be chosen by chance, but with the same uniforms for
    all rows.

    Returns:
        [3 ** L] probabilities, and the nats of dependence that each walk reports.
    """
    targets = all_sequences(table.length)
    token_u = torch.zeros(targets.shape, dtype=torch.float64)
    share = torch.ones(targets.shape, dtype=torch.float64)
    same_row = keyed(torch.zeros(len(targets), dtype=torch.int64), table.length, seed)
    ask, controls = reader(table), controls or Controls()
    vocabulary = family().process.vocabulary

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        prediction = ask(canvas, t, positions)
        p = controls.probabilities(prediction.log_x0, Context(canvas, positions, t, vocabulary))
        p = p / p.sum(-1, keepdim=True)
        token = targets.flatten()[positions.flat][:, None]
        mine = p.gather(-1, token).squeeze(-1)
        below = p.cumsum(-1).gather(-1, token).squeeze(-1) - 0.5 * mine
        token_u.view(-1)[positions.flat] = below  # in place: rules may have asked for it already
        share.view(-1)[positions.flat] = mine
        return prediction

    def draws(stream: Stream, step: int) -> Tensor:
        return token_u if stream == Stream.TOKEN else same_row(stream, step)

    law = torch.ones(len(targets), dtype=torch.float64)
    nats = torch.zeros(len(targets), dtype=torch.float64)
    start = torch.full_like(targets, MASK)
    walk = run(rule, denoise, start, draws, steps, controls=controls)
    for step in walk:
        # What is revealed later is asked for again, so shares are read when they count.
        law.index_put_((step.changed // table.length,), share.flatten()[step.changed].log(), True)
        if step.dependence is not None:
            nats += step.dependence
    assert torch.equal(walk[-1].canvas, targets)
    return (law - 1.0).exp(), nats


def conditionals(joint: Tensor, length: int = LENGTH) -> Table:
    """p(x_i | the tokens in sight) for every set of masks."""
    states = torch.cartesian_prod(*[torch.tensor((*CLEAN, MASK))] * length)
    texts = all_sequences(length)
    fits = ((states[:, None] == texts) | (states[:, None] == MASK)).all(-1)
    each = (texts[..., None] == torch.arange(ROWS)).double().flatten(1)
    mass = (fits * joint) @ each / (fits * joint).sum(-1, keepdim=True)
    log_p = torch.full((ROWS**length, length, ROWS), -torch.inf, dtype=torch.float64)
    log_p[code(states)] = mass.view(-1, length, ROWS).log()
    return Table(log_p)


def truth(seed: int = 3) -> tuple[Tensor, Table]:
    """A random joint law of four tokens, and its conditionals."""
    joint = random_joint(seed, LENGTH)
    return joint, conditionals(joint)


def divergence(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())
