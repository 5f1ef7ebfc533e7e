"""Comparison of answers with what greedy decoding writes after their contexts.

Rule and steps are those of all texts, at temperature 0. With blocks of one token, decoding is from
left to right whatever the rule: an answer is greedy if each of its tokens is the likeliest given
those before it. A single row of the network shows that, which reads what the likelihood reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives import Prediction
from textdiff.evaluate.exam.answer_bounds import windows_of_answers
from textdiff.evaluate.exam.answer_tokens import AnswerTokens
from textdiff.evaluate.exam.writing import AnswerWriter
from textdiff.likelihood.estimators.estimator import NEVER, Estimator, WindowBatch
from textdiff.likelihood.replicates import ReplicateDraws, by_document
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.stopping import EstimateOptions
from textdiff.loss import PositionTerms
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.rules import build_rule
from textdiff.sampling.settings import SamplingConfig


def greedy_matches(writer: AnswerWriter, answers: Sequence[AnswerTokens]) -> list[bool]:
    """Return whether greedy decoding writes each answer after its context."""
    # A likelihood reads a second pass where decoding reads the first, with self-conditioning.
    one_pass = writer.model.model.self_conditioning is None
    if writer.model.family.block_size == 1 and one_pass:
        return _likeliest_tokens(writer, answers)
    config = writer.config({}).merge(temperature=0.0, stop=())
    matches = [False] * len(answers)
    order = sorted(range(len(answers)), key=lambda i: (len(answers[i].ids), i))
    for start in range(0, len(order), writer.batch_size):
        which = order[start : start + writer.batch_size]
        same = _decoded(writer, [answers[i] for i in which], config)
        for index, match in zip(which, same, strict=True):
            matches[index] = match
    return matches


def _decoded(
    writer: AnswerWriter, answers: Sequence[AnswerTokens], config: SamplingConfig
) -> list[bool]:
    """Return whether each answer is what a rule decodes.

    It ends as soon as all rows differ, if the rule does not change tokens that it has written.
    """
    rows = [answer.ids[: answer.start].tolist() for answer in answers]
    keys = [(writer.seed, answer.question) for answer in answers]
    counts = [len(answer.ids) - answer.start for answer in answers]
    request = writer.preparer.request(Job(rows, counts, keys=keys), config)
    family, model = writer.model.family, writer.model.model
    revises = build_rule(config.rule, family, config.knobs).revises
    settled = not (revises or family.process.replaces_tokens)
    mask = family.process.vocabulary.mask_token_id
    wanted = torch.full((len(answers), max(len(a.ids) for a in answers)), mask)  # [R, W]
    for row, answer in zip(wanted, answers, strict=True):
        row[: len(answer.ids)] = torch.from_numpy(answer.ids)
    differs = wanted != mask  # [R, W]
    for step in Engine(model, family, request).run():
        canvas = step.canvas[:, : wanted.shape[1]].cpu()
        differs = (canvas != wanted) & (wanted != mask)
        if settled and bool((differs & (canvas != mask)).any(1).all()):
            break
    return (~differs.any(1)).tolist()


def _likeliest_tokens(writer: AnswerWriter, answers: Sequence[AnswerTokens]) -> list[bool]:
    """Return whether every token of each answer is the likeliest given those before it."""
    model = writer.model
    windows, run = windows_of_answers(model, answers), EstimateOptions()
    scorer = Scorer(model.model, model.family, run.batch_tokens)
    draws = ReplicateDraws(scorer, windows, _Misses(), writer.seed, run)
    nats, _ = draws.split(draws(0))
    return (by_document(nats[None], windows)[0, 0] == 0.0).tolist()


class _Misses(Estimator):
    """Count of tokens that are not the likeliest, all of an answer masked at once."""

    kind: Literal["misses"] = "misses"

    def score(self, batch: WindowBatch, scorer: Scorer) -> dict[str, Tensor]:
        """Return 1 at every scorable position whose token is not the likeliest, else 0."""
        half = torch.full((1, 1), 0.5, dtype=torch.float64)
        u = torch.full(batch.x0.shape, 0.25, dtype=torch.float64)
        u = u.masked_fill(~batch.scorable, NEVER)  # [B, L]
        return {"diffusion": scorer.nats(batch.x0, Noise(half, half, u, half), batch.real, _miss)}


def _miss(terms: PositionTerms, chunk: slice, prediction: Prediction) -> Tensor:
    return (prediction.log_x0.argmax(-1) != terms.x0[chunk]).double()
