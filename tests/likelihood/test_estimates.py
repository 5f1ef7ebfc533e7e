"""What holds for every estimator: batches, shards, interruptions, strides and comparisons."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from exact_tables import LENGTH, TableDenoiser, all_sequences, family, random_table
from safetensors.torch import load_file
from tiny_models import CLEAN, tiny_family, tiny_model

from textdiff.errors import CheckpointError, ConfigError, DataError
from textdiff.likelihood.difference import compare, paired
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.estimators.estimator import strata
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import Windows, cut_windows

WINDOW = 6
LENGTHS = (3, 7, 13, 6, 1)
ALL = [
    ("masked_count", {"samples": 3}),
    ("balanced", {"samples": 3}),
    ("time", {}),
    ("finite_t", {"timesteps": 5}),
    ("any_order", {}),
    ("importance", {"orders": 2}),
    ("chain_rule", {}),
    ("exact", {}),
]


def documents(lengths=LENGTHS) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(4)
    picks = [torch.randint(len(CLEAN), (n,), generator=generator) for n in lengths]
    return [torch.tensor(CLEAN)[p].to(torch.int32).numpy() for p in picks]


def windows_of(texts, family, **options) -> Windows:
    clean = family.process.vocabulary.clean
    return cut_windows(texts, ["x" * len(t) for t in texts], WINDOW, clean, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_batches_and_shards_do_not_matter(model, name, options, block_size):
    chosen = tiny_family(block_size)
    windows = windows_of(documents(), chosen)

    def nats(**settings):
        return estimate(model, chosen, windows, estimator=name, seed=5, **options, **settings).nats

    together = nats()
    assert (together >= 0).all()
    assert (together.sum(0) > 0).all()
    assert (nats(batch_tokens=13) - together).abs().max() < 1e-9
    parts = sum(nats(shard=(rank, 2)) for rank in range(2))
    assert (parts - together).abs().max() < 1e-9


@pytest.mark.parametrize(("name", "options"), [row for row in ALL if row[0] != "time"], ids=str)
def test_other_documents_do_not_matter(model, name, options):
    chosen, texts = tiny_family(), documents()
    alone, together = (
        estimate(model, chosen, windows_of(some, chosen), estimator=name, seed=5, **options).nats
        for some in (texts[:2], texts)
    )
    assert (together[:8, :2] - alone[:8]).abs().max() < 1e-9


def test_the_default_follows_the_family(model):
    windows = windows_of(documents(), tiny_family())
    assert estimate(model, tiny_family(), windows, seed=0).estimator == "masked_count"


# --- strata and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [None, 4])
def test_draws_are_stratified_over_a_window_and_over_its_document(block_size):
    chosen, draws = tiny_family(block_size), 3
    windows = windows_of(documents((30, 6, 9)), chosen)
    v = strata(windows, chosen, 0, 0, draws)
    part = torch.arange(draws)[:, None]
    assert (torch.floor(v * draws) == part).all()
    size = chosen.blocks(WINDOW).size
    for d in range(3):
        mine = (windows.document == d).nonzero().flatten().tolist()
        used = [v[w, :, : -(-len(windows.tokens[w]) // size)] for w in mine]
        places = torch.cat([x.flatten() for x in used])
        cells = torch.floor(places * len(places)).sort().values
        assert torch.equal(cells, torch.arange(len(places)).double())
    again = strata(windows, chosen, 0, 1, draws)
    assert (again != v)[v != 0.5].any()


# --- state ---------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_an_interrupted_estimate_continues(model, tmp_path):
    chosen, path = tiny_family(), tmp_path / "deep" / "state.safetensors"
    windows = windows_of(documents(), chosen)
    options = {"estimator": "balanced", "samples": 2, "seed": 1, "attribute": True}
    whole = estimate(model, chosen, windows, **options)
    calls = []

    def stop(share):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return share

    with pytest.raises(Interrupted):
        estimate(model, chosen, windows, state=path, reduce=stop, **options)
    resumed = estimate(model, chosen, windows, state=path, **options)
    assert torch.equal(resumed.nats, whole.nats)
    assert torch.equal(torch.cat(resumed.token_nats()), torch.cat(whole.token_nats()))
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]
    again = estimate(model, chosen, windows, state=path, **options)
    assert again.rows == 0
    assert torch.equal(again.nats, whole.nats)
    more = estimate(model, chosen, windows, state=path, replicates=12, **options)
    assert torch.equal(more.nats[:8], whole.nats)
    assert more.replicates == 12


def test_an_interrupted_precision_continues(model, tmp_path):
    """In its pilot and after it; the replicates of a fixed number go on in it."""
    chosen, path = tiny_family(), tmp_path / "state"
    windows = windows_of(documents(), chosen)
    options = {"seed": 1, "precision": 0.05}
    whole = estimate(model, chosen, windows, **options)
    assert whole.replicates > 8
    for stop in (3, len(whole.pilot) + 2):
        calls = []

        def interrupt(share, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) == stop:
                raise Interrupted
            return share

        with pytest.raises(Interrupted):
            estimate(model, chosen, windows, state=path, reduce=interrupt, **options)
        if stop == 3:
            assert len(load_file(path)["pilot"]) == 2
    resumed = estimate(model, chosen, windows, state=path, **options)
    assert torch.equal(resumed.nats, whole.nats)
    assert torch.equal(resumed.pilot, whole.pilot)
    assert resumed.rows < whole.rows
    again = estimate(model, chosen, windows, state=path, **options)
    assert again.rows == 0
    fixed = estimate(model, chosen, windows, state=path, seed=1, replicates=whole.replicates)
    assert torch.equal(fixed.nats, whole.nats)
    assert (fixed.rows, len(fixed.pilot)) == (0, 0)


@pytest.mark.parametrize("what", ["seed", "text", "model", "estimator"])
def test_a_state_of_another_job_is_refused(model, tmp_path, what):
    chosen, path = tiny_family(), tmp_path / "state"
    texts = documents()
    estimate(model, chosen, windows_of(texts, chosen), seed=1, state=path)
    other = tiny_model(seed=1) if what == "model" else model
    windows = windows_of(texts[:2] if what == "text" else texts, chosen)
    options = {"samples": 3} if what == "estimator" else {}
    with pytest.raises(CheckpointError) as error:
        estimate(other, chosen, windows, seed=2 if what == "seed" else 1, state=path, **options)
    assert error.value.code == f"saved_with_another_{what}"


def test_a_state_that_is_none_is_refused(model, tmp_path):
    chosen, path = tiny_family(), tmp_path / "state"
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError) as error:
        estimate(model, chosen, windows_of(documents(), chosen), seed=1, state=path)
    assert error.value.code == "not_a_saved_estimate"


# --- strides and context -------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 4, 6, None])
def test_every_token_is_scored_once(stride):
    chosen, texts = tiny_family(), documents()
    windows = windows_of(texts, chosen, stride=stride)
    scored = windows.scored or [np.ones(len(t), bool) for t in windows.tokens]
    for d, text in enumerate(texts):
        mine = (windows.document == d).nonzero().flatten().tolist()
        fresh = np.concatenate([windows.tokens[w][scored[w]] for w in mine])
        assert np.array_equal(fresh, text)
        if stride is not None and stride < WINDOW and len(text) > WINDOW:
            assert all(len(windows.tokens[w]) == WINDOW for w in mine)
    assert windows.document_tokens.tolist() == list(LENGTHS)


def test_strided_windows_read_what_came_before():
    """Left to right with stride 1 over a window of 2: a chain of pairs."""
    table = random_table(2, length=2)
    text = torch.tensor([0, 3, 2, 2])
    clean = family().process.vocabulary.clean
    windows = cut_windows([text.to(torch.int32).numpy()], ["abcd"], 2, clean, stride=1)
    found = estimate(
        TableDenoiser(table), family(), windows, estimator="chain_rule", seed=0
    ).bound()
    pairs = [text[i : i + 2] for i in range(3)]
    exact = table.chain(pairs[0], (0, 1)) + sum(table.cross_entropy(x, (1,)) for x in pairs[1:])
    assert found.mean * 4 == pytest.approx(exact, abs=1e-12)
    assert (found.tokens, found.bytes) == (4, 4)


@pytest.mark.parametrize("stride", [0, 7])
def test_strides_out_of_range_are_refused(stride):
    with pytest.raises(ConfigError) as error:
        windows_of(documents(), tiny_family(), stride=stride)
    assert error.value.code == "stride_out_of_range"


def test_a_text_that_is_all_context_is_refused():
    texts = documents()
    with pytest.raises(DataError) as error:
        windows_of(texts, tiny_family(), scored=[np.zeros(len(t), bool) for t in texts])
    assert error.value.code == "no_token_to_score"


# --- comparison ----------------------------------------------------------------------------------


def table_estimates(seed: int, **options) -> Estimates:
    texts = [x.to(torch.int32).numpy() for x in all_sequences()]
    clean = family().process.vocabulary.clean
    windows = cut_windows(texts, ["abc"] * len(texts), LENGTH, clean)
    return estimate(TableDenoiser(random_table(seed)), family(), windows, seed=7, **options)


def test_a_difference_is_that_of_the_bounds_with_less_error():
    a, b = table_estimates(0), table_estimates(0)
    same = compare(a, b)
    assert (same.mean, same.stderr, same.interval()) == (0.0, 0.0, (0.0, 0.0))
    near = random_table(0)
    near.log_p[:, 0] = random_table(1).log_p[:, 0]
    windows = a.windows
    many = {"seed": 7, "replicates": 64}
    a = estimate(TableDenoiser(random_table(0)), family(), windows, **many)
    b = estimate(TableDenoiser(near), family(), windows, **many)
    found = compare(a, b)
    assert found.mean == pytest.approx(a.bound().mean - b.bound().mean, abs=1e-12)
    assert found.stderr < 0.9 * math.hypot(a.bound().stderr, b.bound().stderr)
    exact = [
        estimate(TableDenoiser(t), family(), windows, estimator="exact", seed=0)
        for t in (random_table(0), near)
    ]
    truth = compare(*exact)
    assert truth.stderr == 0.0
    assert abs(found.mean - truth.mean) < 4 * found.stderr
    per_byte = compare(*exact, per_byte=True)
    assert per_byte.mean == pytest.approx(truth.mean / math.log(2.0))  # one byte per token here
    assert per_byte.unit == "bits/byte"


def test_both_models_of_a_pair_have_the_replicates_that_either_needs(model):
    """One window: blocks of two draw noise three times as often as the whole."""
    text, calls = documents((6,)), []

    def run(block_size, replicates):
        chosen = tiny_family(block_size)
        calls.append((block_size, replicates))
        return estimate(model, chosen, windows_of(text, chosen), seed=5, replicates=replicates)

    for sizes in ((None, 2), (2, None)):
        whole, blocks = (partial(run, size) for size in sizes)
        found = paired(whole, blocks, 8)
        assert {e.least for e in found} == {32, 11}
        assert [e.replicates for e in found] == [32, 32]
        assert compare(*found).replicates == 32
    assert calls == [(None, 8), (2, 32), (2, 8), (None, 11), (2, 32)]
    exact = partial(estimate, model, tiny_family(2), found[0].windows, seed=5, estimator="exact")
    pair = paired(lambda n: exact(replicates=n), partial(run, None), 8)
    assert [e.replicates for e in pair] == [1, 32]


def test_other_texts_and_other_tokens_are_refused():
    texts = [x.to(torch.int32).numpy() for x in all_sequences()[:4]]
    clean = family().process.vocabulary.clean

    def of(texts, names):
        windows = cut_windows(texts, names, LENGTH, clean)
        return estimate(TableDenoiser(random_table(0)), family(), windows, seed=7)

    base = of(texts, ["abc"] * 4)
    with pytest.raises(DataError) as error:
        compare(base, of(texts[:3], ["abc"] * 3), per_byte=True)
    assert error.value.code == "different_texts"
    other = of([text[:2] for text in texts], ["abc"] * 4)  # the same text in fewer tokens
    with pytest.raises(DataError) as error:
        compare(base, other)
    assert error.value.code == "different_tokens"
    expected = base.bound().bits_per_byte - other.bound().bits_per_byte
    assert compare(base, other, per_byte=True).mean == pytest.approx(expected)
