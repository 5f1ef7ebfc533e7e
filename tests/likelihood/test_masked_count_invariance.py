"""Identity 28: a document's nats do not depend on padding, batch, company or process."""

import pytest
import torch
from tiny_models import CLEAN, MASK, tiny_family, tiny_model

from textdiff.diffusion import randomness
from textdiff.diffusion.randomness import Stream
from textdiff.errors import DataError
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows

WINDOW = 8
LENGTHS = (3, 17, 8, 1)  # within a window, over several, a whole one, the shortest


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    picks = [torch.randint(len(CLEAN), (n,), generator=generator) for n in LENGTHS]
    return [torch.tensor(CLEAN)[p] for p in picks]


def windows_of(texts, family):
    arrays = [text.to(torch.int32).numpy() for text in texts]
    clean = family.process.vocabulary.clean
    return cut_windows(arrays, ["x" * len(t) for t in texts], WINDOW, clean)


@pytest.fixture(scope="module", params=["time-free", "time-conditioned"])
def model(request):
    if request.param == "time-free":
        return tiny_model()
    return tiny_model(adaln=True, time_conditioning=True)


@pytest.fixture(params=[None, 4, 3, 1], ids=lambda b: f"block-{b}")
def chosen(request):
    return tiny_family(request.param)


def nats(model, family, windows, **options) -> torch.Tensor:
    return estimate(model, family, windows, seed=5, **options).nats


def nats_of_seed(model, family, windows, seed: int) -> torch.Tensor:
    return estimate(model, family, windows, seed=seed).nats


def test_batch_size_and_padding_do_not_matter(model, chosen):
    windows = windows_of(documents(), chosen)
    together = nats(model, chosen, windows, batch_tokens=8192)
    assert together.shape == (8, len(LENGTHS))
    assert (together > 0).all()
    for batch_tokens in (1, 17, 40):  # one window a call, a few, most of them
        assert (
            nats(model, chosen, windows, batch_tokens=batch_tokens) - together
        ).abs().max() < 1e-9


def test_shards_add_up(model, chosen):
    windows = windows_of(documents(), chosen)
    whole = nats(model, chosen, windows)
    for processes in (2, 7):  # 7: more processes than windows
        parts = [nats(model, chosen, windows, shard=(rank, processes)) for rank in range(processes)]
        assert (sum(parts) - whole).abs().max() < 1e-9


def test_reduce_is_applied_to_every_replicate(model, chosen):
    windows = windows_of(documents()[:2], chosen)
    doubled = nats(model, chosen, windows, reduce=lambda share: 2.0 * share)
    assert torch.equal(doubled, 2.0 * nats(model, chosen, windows))


def test_later_documents_do_not_change_earlier_ones(model, chosen):
    texts = documents()
    alone = nats(model, chosen, windows_of(texts[:2], chosen))
    together = nats(model, chosen, windows_of(texts, chosen))
    assert (together[:8, :2] - alone[:8]).abs().max() < 1e-9


def test_replicates_and_seeds_are_different_draws(model, chosen):
    windows = windows_of(documents(), chosen)
    first, again, other = (nats_of_seed(model, chosen, windows, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    if chosen.block_size == 1 and not model.config.time_conditioning:
        assert (first - first[0]).abs().max() < 1e-9  # autoregressive: nothing is random
        assert (first - other).abs().max() < 1e-9
    else:
        totals = torch.cat([first, other]).sum(1)
        assert len(totals.unique()) == len(totals)


def test_every_token_is_scored_once_in_windows_of_its_document(chosen):
    texts = documents()
    windows = windows_of(texts, chosen)
    for d, text in enumerate(texts):
        mine = [windows.tokens[w] for w in (windows.document == d).nonzero().flatten().tolist()]
        assert torch.equal(torch.cat([torch.from_numpy(w) for w in mine]), text)
        assert [len(w) for w in mine[:-1]] == [WINDOW] * (len(mine) - 1)
        places = windows.index[windows.document == d]
        assert torch.equal(places, torch.arange(len(mine)))
    assert windows.document_tokens.tolist() == list(LENGTHS)


def test_a_batch_pads_and_says_where(chosen):
    windows = windows_of(documents(), chosen)
    x0, real, scored = windows.batch([0, 1], MASK)
    assert torch.equal(real, scored)
    assert x0.shape == real.shape == (2, 8)
    assert torch.equal(real.sum(1), torch.tensor([3, 8]))
    assert (x0[~real] == MASK).all()
    assert not (x0[real] == MASK).any()


def test_noise_is_keyed_by_document_window_and_replicate(chosen, monkeypatch):
    """No two (document, window, replicate) share a position's uniform."""
    drawn = []
    original = randomness.uniforms

    def watched(seed, stream, **keys):
        u = original(seed, stream, **keys)
        if stream == Stream.POSITION:
            drawn.append(u.flatten())
        return u

    monkeypatch.setattr(randomness, "uniforms", watched)
    estimate(tiny_model(), chosen, windows_of(documents(), chosen), seed=0)
    values = torch.cat(drawn)
    assert len(values.unique()) == len(values)


def test_tokens_the_model_cannot_predict_are_refused(chosen):
    for foreign in (MASK, 10, 11, 4000):
        with pytest.raises(DataError, match=f"document 2 has 1 token.*id {foreign}"):
            windows_of([torch.tensor([0, 1]), torch.tensor([0, foreign, 1])], chosen)
    with pytest.raises(DataError) as error:
        windows_of([torch.zeros(0, dtype=torch.int64)], chosen)
    assert error.value.code == "no_token_to_score"
