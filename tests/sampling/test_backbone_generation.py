"""Generation from networks of transformers: with a cache as without, for every architecture."""

import sys
from pathlib import Path

import pytest
import torch
from engines import generate
from test_cache import FREE
from tiny_models import CLEAN, CONTEXT, MASK, ROWS, tiny_family

from textdiff.sampling.job import Job

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from test_backbones import CAUSAL_KINDS, FULL_KINDS, build

PROMPTS = [[], [CLEAN[3]] * 9, [CLEAN[1], CLEAN[2]]]
NEW = [13, 6, 1]


@pytest.mark.parametrize("kind", CAUSAL_KINDS + FULL_KINDS)
def test_cached_generation_is_uncached_generation(kind: str) -> None:
    denoiser = build(kind, torch.float64, vocab_size=ROWS, pad_token_id=9)
    denoiser.config.diffusion = {"sequence_length": CONTEXT}
    family, job = tiny_family(4), Job(PROMPTS, NEW, seed=5)

    def rows(**options: object) -> list[list[int]]:
        steps = generate(denoiser, family, job, rule="ancestral", steps=2, controls=FREE, **options)
        canvas = list(steps)[-1].canvas
        return [row[:n].tolist() for row, n in zip(canvas, job.lengths.tolist(), strict=True)]

    plain = rows()
    assert rows(cache=True, slots=2) == plain
    assert all(MASK not in row for row in plain)
