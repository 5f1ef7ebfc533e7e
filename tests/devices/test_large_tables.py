"""Tables of a large vocabulary: none but the logits has a row for every position at once."""

import pytest
import torch
from test_rules import FAMILIES
from test_training_step import SPECS, batch_of, network, spec_of, step
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from textdiff import loss as loss_module
from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.likelihood.scorer import nelbo, reconstruction
from textdiff.loss import PositionTerms
from textdiff.sampling import parts as parts_module
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.request import Request
from textdiff.sampling.settings import SamplingConfig

VOCABULARY, AT_ONCE = 50_000, 4
# Rows of a part in float64, and the gradient of a head of 8 hidden units in float32.
BOUND = AT_ONCE * VOCABULARY * 8
HEAD = {"addmm", "mm"}


class Largest(TorchDispatchMode):
    """Notes operations that make more bytes than the bound, and tables of integers."""

    def __init__(self):
        super().__init__()
        self.large: set[str] = set()
        self.integers: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = [] if func.is_view else pytree.tree_leaves(result)
        for x in (x for x in leaves if isinstance(x, torch.Tensor)):
            if x.untyped_storage().nbytes() > BOUND:
                self.large.add(func.overloadpacket.__name__)
            if x.dtype == torch.int64 and x.ndim == 2 and x.shape[1] == VOCABULARY:
                self.integers.add(func.overloadpacket.__name__)
        return result


def vocabulary() -> Vocabulary:
    return Vocabulary.of(VOCABULARY, 44, [43])


@pytest.mark.parametrize("name", [name for name in SPECS if name != "learned"])
def test_a_loss_and_a_bound_are_made_in_chunks(name, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", AT_ONCE * VOCABULARY)
    model = network(name, vocab_size=VOCABULARY, hidden_size=8)
    family = build_family(spec_of(name), vocabulary())
    batch = batch_of(family)
    with Largest() as watch:
        step(model, family, batch)
        with torch.no_grad():
            terms = PositionTerms(model, family, batch)
            for chunk, prediction in terms.predictions():
                nelbo(terms, chunk, prediction)
                reconstruction(terms, chunk, prediction)
    assert (watch.large, watch.integers) == (set(), set())  # one-hot rows are float64 at once


SPECIAL = {"sedd-uniform": "sedd uniform", "d3pm-plugged": "d3pm", "d3pm-uniform": "d3pm uniform"}
RULES = [
    ("mdlm", "ancestral", {}),
    ("mdlm", "confidence", {"knobs": {"order": "entropy"}}),
    ("mdlm", "remask", {"knobs": {"remasking": "conf"}}),
    ("mdlm", "ancestral", {"guidance": 0.5, "top_p": 0.9}),
    ("sedd", "tweedie", {}),
    ("sedd-uniform", "euler", {}),
    ("d3pm-plugged", "ancestral", {}),
    ("d3pm-uniform", "threshold", {}),
    ("udlm", "ancestral", {"knobs": {"stable_calls": 1}}),
    ("udlm", "entropy_bound", {}),
    ("gidd", "gibbs", {"guidance": 0.5}),
    ("gidd", "predictor_corrector", {"knobs": {"corrections": 1}}),
]


@pytest.mark.parametrize(("case", "rule", "options"), RULES)
def test_a_sampling_call_holds_the_logits_and_parts(case, rule, options, monkeypatch):
    monkeypatch.setattr(parts_module, "WEIGHTS", AT_ONCE * VOCABULARY)
    name = SPECIAL.get(case, case)
    model = network(name, vocab_size=VOCABULARY, hidden_size=8).eval()
    family = build_family(spec_of(name) | {"objective": FAMILIES[case][1]}, vocabulary())
    job = Job([[3], [4, 5]], [6, 5])
    request = Request(job, SamplingConfig(rule=rule, steps=2, **options))
    parts = ("draft", "confidence", "entropy")
    with Largest() as watch:
        seen = [step.canvas for step in Engine(model, family, request, parts=parts).run()]
    assert watch.large <= HEAD
    monkeypatch.undo()  # one part: the same tokens
    again = [step.canvas for step in Engine(model, family, request, parts=parts).run()]
    assert all(torch.equal(one, other) for one, other in zip(seen, again, strict=True))
