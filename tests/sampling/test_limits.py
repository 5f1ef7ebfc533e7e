"""What lies exactly on a limit: the last step, the least share, the first place of an end."""

import torch
from engines import generate
from test_rules import family_of
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_family, tiny_model

from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job

END, A = CLEAN[-1], CLEAN[0]


def certain(token: int):
    """A network that is all but certain of one token everywhere."""
    model = tiny_model(adaln=True, time_conditioning=True)

    def sure(module, inputs, logits):
        logits = 0.0 * logits
        logits[:, token] = 60.0
        return logits

    model.output_layer.register_forward_hook(sure)
    return model


def test_no_noise_is_left_after_the_last_step_whatever_the_schedule_has_there():
    schedule = {"kind": "geometric", "sigma_min": 0.5, "sigma_max": 3.0}
    for kind, timesteps in (("udlm", None), ("d3pm", 4)):
        spec = {"process": "uniform", "schedule": schedule, "objective": {"kind": kind}}
        spec = {**spec, "block_size": None, "timesteps": timesteps}
        family = build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED))
        job = Job([[]] * 20, [9] * 20)
        walk = generate(
            certain(A), family, job, rule="ancestral", steps=4, controls=Controls(), slots=20
        )
        *_, before, last = walk
        assert (before.canvas != A).any()
        assert (last.canvas == A).float().mean() == 1.0


def test_tokens_as_likely_as_the_least_share_are_kept():
    log_p = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    for min_p, kept in ((0.5, 2), (0.51, 1), (0.25, 4), (0.26, 2), (1.0, 1)):
        weights = Controls(min_p=min_p).probabilities(log_p)
        assert int((weights > 0.0).sum()) == kept, min_p
    even = torch.zeros(1, 4, dtype=torch.float64)
    assert int((Controls(min_p=1.0).probabilities(even) > 0.0).sum()) == 4


def test_tokens_that_begin_at_the_nucleus_are_not_in_it():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    for top_p, kept in ((0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1.0, 4), (1e-9, 1)):
        assert int((Controls(top_p=top_p).probabilities(p.log()) > 0.0).sum()) == kept, top_p


def test_an_end_may_stand_right_behind_the_least_number_of_new_tokens():
    """Of a network that wants nothing else, and after prompts of two lengths."""
    prompts, new = [[A, A], [A] * 5, [None, A]], [5, 2, 3]
    for least in (0, 1, 2):
        controls = Controls(end_tokens=(END,), min_new_tokens=least)
        for family in (tiny_family(), tiny_family(4), family_of("udlm")):
            *_, last = generate(
                certain(END),
                family,
                Job(prompts, new),
                rule="ancestral",
                steps=3,
                controls=controls,
            )
            for row, prompt, count in zip(last.canvas.tolist(), prompts, new, strict=True):
                tail = row[len(prompt) : len(prompt) + count]
                assert END not in tail[:least]
                assert tail[least:] == [END] * (count - least)
