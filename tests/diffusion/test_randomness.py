"""Identity 23 and the hash behind every random number."""

import itertools

import pytest
import torch
from exact_stats import chi_square_p, ks_statistic

from textdiff.diffusion import randomness
from textdiff.diffusion.randomness import Stream, bits, stratified, uniforms

MANY = torch.arange(100_000)
KEYS = ("row", "block", "step", "position")


def test_golden_values_never_change():
    """Pinned: other values would silently change every run, bound and sample."""
    expected = {
        (0, Stream.STRATA): 0.7913447425247239,
        (0, Stream.POSITION): 0.8832874605515494,
        (0, Stream.TOKEN, 1): 0.29766735720285464,
        (0, Stream.TOKEN, 0, 1): 0.32873043196173735,
        (0, Stream.TOKEN, 0, 0, 1): 0.6508875166661418,
        (0, Stream.TOKEN, 0, 0, 0, 1): 0.9932476795199586,
        (1, Stream.TOKEN): 0.7184701491252287,
        (2**31 - 1, Stream.DROPOUT, 123456789, 7, 4096, 1023): 0.5643172223311977,
        (-1, Stream.EPOCH): 0.2917753903820067,
        (20240611, Stream.JITTER, 2**40, 3, 2, 1): 0.5087697995844914,
    }
    for arguments, value in expected.items():
        assert float(uniforms(*arguments)) == value


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("start", [0, 2**40])
def test_values_along_every_key_are_uniform(key, start):
    assert ks_statistic(uniforms(0, Stream.TOKEN, **{key: MANY + start})) < 1.95


def test_values_along_seeds_are_uniform():
    u = torch.stack([uniforms(seed, Stream.TOKEN) for seed in range(3000)])
    assert ks_statistic(u) < 1.95


def neighbours() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Uniforms whose keys differ by one in a single argument, the others running."""
    pairs = {}
    for key, other in itertools.permutations(KEYS, 2):
        first = uniforms(3, Stream.TOKEN, **{other: MANY, key: 5})
        second = uniforms(3, Stream.TOKEN, **{other: MANY, key: 6})
        pairs[f"{key} against {other}"] = first, second
    for key in KEYS:
        u = uniforms(3, Stream.TOKEN, **{key: MANY})
        pairs[f"consecutive {key}"] = u[:-1], u[1:]
        swapped = {other: 5 for other in KEYS if other != key}
        pairs[f"{key} with others"] = u, uniforms(3, Stream.TOKEN, **{key: MANY}, **swapped)
    for other in KEYS:
        first = uniforms(3, Stream.TOKEN, **{other: MANY})
        for stream in Stream:
            if stream != Stream.TOKEN:
                pairs[f"{stream.name} over {other}"] = first, uniforms(3, stream, **{other: MANY})
        pairs[f"seed over {other}"] = first, uniforms(4, Stream.TOKEN, **{other: MANY})
    return pairs


@pytest.fixture(scope="module")
def neighbour_pairs():
    return neighbours()


def test_neighbouring_keys_are_uncorrelated(neighbour_pairs):
    for name, (first, second) in neighbour_pairs.items():
        centred = (first - 0.5) * (second - 0.5) * 12.0
        assert abs(float(centred.mean())) * len(first) ** 0.5 < 4.2, name


def test_neighbouring_keys_are_jointly_uniform(neighbour_pairs):
    cells = 16
    for name, (first, second) in neighbour_pairs.items():
        index = (first * cells).long() * cells + (second * cells).long()
        counts = torch.bincount(index, minlength=cells**2).double()
        assert chi_square_p(counts, torch.full_like(counts, len(first) / cells**2)) > 1e-4, name


def test_every_bit_is_fair_and_every_value_different():
    values = bits(1, Stream.POSITION, row=MANY)
    assert len(values.unique()) == len(values)
    for shift in range(64):
        ones = int(((values >> shift) & 1).sum())
        assert abs(ones - len(MANY) / 2) < 4.2 * (len(MANY) / 4) ** 0.5


def test_keys_do_not_exchange_their_roles():
    """The same numbers under other names are other draws."""
    values = [
        uniforms(seed, stream, row=row, block=block, step=step, position=position)
        for seed, stream, row, block, step, position in itertools.product(
            (0, 1), (Stream.STRATA, Stream.JITTER), (0, 1), (0, 1), (0, 1), (0, 1)
        )
    ]
    assert len(set(map(float, values))) == 64


def test_values_do_not_depend_on_how_keys_are_batched():
    rows, positions = torch.arange(7, 19), torch.arange(33)
    together = uniforms(9, Stream.TOKEN, row=rows[:, None], block=2, step=5, position=positions)
    assert together.shape == (12, 33)
    for i, j in itertools.product((0, 5, 11), (0, 16, 32)):
        alone = uniforms(
            9, Stream.TOKEN, row=int(rows[i]), block=2, step=5, position=int(positions[j])
        )
        assert float(alone) == float(together[i, j])
    part = uniforms(9, Stream.TOKEN, row=rows[3:5, None], block=2, step=5, position=positions[4:9])
    assert torch.equal(part, together[3:5, 4:9])
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    again = uniforms(9, Stream.TOKEN, row=rows[shuffled, None], block=2, step=5, position=positions)
    assert torch.equal(again, together[shuffled])
    as_tensors = uniforms(
        9,
        Stream.TOKEN,
        row=rows[:, None],
        block=torch.tensor(2),
        step=torch.tensor(5),
        position=positions[None].expand(12, -1),
    )
    assert torch.equal(as_tensors, together)


def test_large_and_negative_seeds_are_seeds():
    values = {float(uniforms(seed, Stream.TOKEN)) for seed in (-1, 0, 1, 2**31, 2**63, 2**64 - 2)}
    assert len(values) == 6


@pytest.mark.parametrize("pattern", [0, 1, -1, 2**63 - 1, -(2**63), -(2**11), -(2**12)])
def test_no_bit_pattern_leaves_the_open_interval(pattern, monkeypatch):
    monkeypatch.setattr(randomness, "bits", lambda *keys: torch.tensor(pattern))
    assert 0.0 < float(uniforms(0, Stream.TOKEN)) < 1.0


# --- stratified ----------------------------------------------------------------------------------


def strata(steps: int, count: int) -> torch.Tensor:
    """[steps, count] stratified draws, keyed as in training."""
    step, at = torch.arange(steps)[:, None], torch.arange(count)
    return stratified(
        uniforms(0, Stream.STRATA, step=step, position=at),
        uniforms(0, Stream.JITTER, step=step, position=at),
    )


@pytest.fixture(scope="module")
def drawn():
    return strata(5000, 16)


def test_every_step_has_one_point_in_each_stratum(drawn):
    assert ((drawn * 16).long().sort(1).values == torch.arange(16)).all()


def test_every_entry_is_marginally_uniform(drawn):
    for entry in drawn.T:
        assert ks_statistic(entry.clone()) < 1.95


def test_every_entry_meets_every_stratum_equally_often(drawn):
    for entry in (drawn * 16).long().T:
        counts = torch.bincount(entry, minlength=16).double()
        assert chi_square_p(counts, torch.full_like(counts, len(drawn) / 16)) > 1e-4


@pytest.mark.parametrize("count", [2, 16, 64])
def test_variance_of_the_mean_falls_with_the_cube(count):
    """1 / (12 n^3), against 1 / (12 n) for independent draws."""
    steps = 5000
    ratio = float(strata(steps, count).mean(1).var()) * 12.0 * count**3
    assert abs(ratio - 1.0) < 4 * (2 / steps) ** 0.5


def test_strata_stay_below_one():
    jitter = torch.full((8,), 1.0 - 2.0**-53, dtype=torch.float64)
    assert (stratified(torch.rand(8, dtype=torch.float64), jitter) < 1.0).all()
