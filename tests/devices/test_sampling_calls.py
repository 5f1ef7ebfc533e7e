"""Generation on a device that computes by itself: what the CPU waits for, and equal texts."""

import pytest
import torch
from pretend import moved, pretending
from test_rules import FAMILIES, FITS
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_model

from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.sampling import segment as segment_module
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.request import Request
from textdiff.sampling.settings import SamplingConfig

# Their positions do not depend on what the network returns.
AHEAD = {"ancestral", "first_hitting", "remask"}
CASES = [
    *(("mdlm", rule, size) for rule in sorted(FITS["mdlm"]) for size in (None, 4)),
    *(("udlm", rule, None) for rule in sorted(FITS["udlm"])),
    ("sedd", "euler", None), ("d3pm-plugged", "ancestral", None), ("gidd", "ancestral", 4),
]  # fmt: skip
JOB = Job([[CLEAN[0]], [], [CLEAN[1], None, CLEAN[2]]], [7, 8, 5])


def family(case: str, block_size: int | None, device=None):
    process, objective = FAMILIES[case]
    spec = {
        "process": process,
        "schedule": {"kind": "hybrid" if case == "gidd" else "loglinear"},
        "objective": objective,
        "block_size": block_size,
        "timesteps": 5 if "d3pm" in case else None,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED), device)


@pytest.mark.parametrize(("case", "rule", "size"), CASES)
def test_a_call_waits_for_the_device_once_at_most(case, rule, size):
    model = tiny_model(adaln=True, time_conditioning=True).requires_grad_(False)
    request = Request(JOB, SamplingConfig(rule=rule, steps=4))
    *_, expected = Engine(model, family(case, size), request).run()
    with pretending() as watch:
        moved(model, watch)
        engine = Engine(model, family(case, size, watch.device), request)
        watch.uploads.clear(), watch.waits.clear()
        *_, last = engine.run()
    assert torch.equal(last.canvas.held, expected.canvas)
    assert watch.uploads == []
    segments = 1 if size is None else 3  # one check each, and one reading of prompts
    admissions = 0 if size is None else 1
    calls = 0 if case == "mdlm" and rule in AHEAD else last.calls
    calls *= 2 if rule == "gibbs" else 1  # it chooses positions, and says which have changed
    assert len(watch.waits) <= segments + admissions + calls


@pytest.mark.parametrize(("case", "rule"), [("d3pm-uniform", "ancestral"), ("gidd", "gibbs")])
def test_noise_is_redrawn_some_positions_at_a_time(case, rule, monkeypatch):
    model = tiny_model(adaln=True, time_conditioning=True)
    request = Request(
        JOB, SamplingConfig(rule=rule, steps=4, guidance=0.5 if case == "gidd" else 0.0)
    )
    whole = [step.canvas for step in Engine(model, family(case, None), request).run()]
    sizes: list[int] = []
    weigh = segment_module.next_token_weights

    def counted(prediction, tokens, *rest):
        sizes.append(len(tokens))
        return weigh(prediction, tokens, *rest)

    monkeypatch.setattr(segment_module, "next_token_weights", counted)
    monkeypatch.setattr(segment_module, "WEIGHTS", 5 * ROWS)
    parts = [step.canvas for step in Engine(model, family(case, None), request).run()]
    assert max(sizes) == 5
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
