"""Documents of any length: what their text and their end cost, against enumeration.

The references run the network block by block over a clean prefix, never over two streams, and sum
over sets of masked positions or over texts themselves.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from exact_tables import CLEAN as TOKENS
from exact_tables import TableDenoiser, all_sequences, oracle, random_joint
from exact_tables import family as table_family
from refusals import refused
from tiny_models import CLEAN, CONTEXT, EXCLUDED, MASK, ROWS, tiny_family, tiny_model
from torch import Tensor

from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import CheckpointError, ConfigError, DataError
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import Windows, cut_windows, with_rest
from textdiff.models import Layout

END = CLEAN[-1]
WORDS = CLEAN[:-1]
LENGTHS = (0, 1, 3, 5, 4, 8)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=2)


def documents(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(6)
    picks = [torch.randint(len(WORDS), (n,), generator=generator).tolist() for n in lengths]
    return [[WORDS[i] for i in pick] for pick in picks]


def cut(texts, length: int = CONTEXT, end: int | None = END, **options) -> Windows:
    clean = tiny_family().process.vocabulary.clean
    arrays = [np.array(text, dtype=np.int32) for text in texts]
    return cut_windows(arrays, ["x" * len(t) for t in texts], length, clean, end=end, **options)


def scores(model, block_size: int | None, texts, name: str, end: int | None = END, **options):
    family = tiny_family(block_size)
    return estimate(model, family, cut(texts, end=end), estimator=name, seed=3, **options)


# --- references ----------------------------------------------------------------------------------


def log_p(model, prefix: list[int], blocks: Tensor, size: int) -> Tensor:
    """[B, size, ROWS] log-probabilities of one block [B, size] of noisy tokens after a prefix."""
    seen = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(blocks), -1), blocks], 1)
    with torch.no_grad():
        logits = model(seen, layout=Layout("block_causal", size)).logits[:, len(prefix) :]
    allowed = torch.full((ROWS,), -torch.inf, dtype=torch.float64)
    allowed[list(CLEAN)] = 0.0
    return (logits + allowed).log_softmax(-1)


def block_costs(model, prefix: list[int], tokens: list[int], size: int) -> list[float]:
    """The bound's nats of each of a block's first tokens, the rest of it masked throughout."""
    n = len(tokens)
    sets = [s for k in range(1, n + 1) for s in itertools.combinations(range(n), k)]
    blocks = torch.full((len(sets), size), MASK)
    blocks[:, :n] = torch.tensor(tokens)
    for row, hit in zip(blocks, sets, strict=True):
        row[list(hit)] = MASK
    logs = log_p(model, prefix, blocks, size)
    costs = [0.0] * n
    for row, hit in enumerate(sets):
        for i in hit:
            weight = 1.0 / (len(hit) * math.comb(n, len(hit)))
            costs[i] -= weight * float(logs[row, i, tokens[i]])
    return costs


def token_costs(model, tokens: list[int], size: int) -> list[float]:
    """The bound's nats of every token."""
    starts = range(0, len(tokens), size)
    parts = [block_costs(model, tokens[:s], tokens[s : s + size], size) for s in starts]
    return [cost for part in parts for cost in part]


def one_by_one(model, tokens: list[int], size: int) -> float:
    """-log p of decoding left to right, every block starting from masks alone."""
    total = 0.0
    for i, token in enumerate(tokens):
        start = i - i % size
        block = torch.full((1, size), MASK)
        block[0, : i - start] = torch.tensor(tokens[start:i])
        total -= float(log_p(model, tokens[:start], block, size)[0, i - start, token])
    return total


def every_text(length: int) -> list[list[int]]:
    return [list(text) for text in itertools.product(WORDS, repeat=length)]


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, None])
def test_enumeration_sums_over_the_masks_of_what_there_is(model, block_size):
    size = block_size or CONTEXT
    found = scores(model, block_size, documents(), "exact")
    for index, text in enumerate(documents()):
        costs = token_costs(model, [*text, END], size)
        assert float(found.nats[0, index]) == pytest.approx(sum(costs), abs=1e-10)
        end = float(found.parts["end_of_text"][0, index])
        assert end == pytest.approx(costs[-1], abs=1e-10)
    assert found.bound().terms["end_of_text"] * sum(LENGTHS) == pytest.approx(
        float(found.parts["end_of_text"].sum())
    )


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_without_its_end_a_text_is_the_beginning_of_any_text(model, block_size):
    found = scores(model, block_size, documents()[1:], "exact", end=None)
    for index, text in enumerate(documents()[1:]):
        exact = sum(token_costs(model, text, block_size))
        assert float(found.nats[0, index]) == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, None])
def test_left_to_right_is_the_likelihood_of_the_text_and_its_end(model, block_size):
    found = scores(model, block_size, documents(), "chain_rule")
    for index, text in enumerate(documents()):
        exact = one_by_one(model, [*text, END], block_size or CONTEXT)
        assert float(found.nats[0, index]) == pytest.approx(exact, abs=1e-10)


def test_blocks_of_one_token_are_autoregressive_whatever_the_estimator(model):
    """Identity 14, through the public estimators and with ends."""
    chain = scores(model, 1, documents(), "chain_rule").nats[0]
    for name in ("exact", "masked_count", "balanced", "any_order", "importance"):
        found = scores(model, 1, documents(), name)
        assert (found.nats - chain).abs().max() < 1e-10, name
        assert found.bound().stderr < 1e-12
    assert chain.std() > 0.1


def test_one_block_of_the_context_is_the_full_sequence(model):
    """Identity 14's other end: the layouts differ, the numbers do not."""
    texts = documents()
    for name in ("exact", "masked_count", "chain_rule"):
        blocks, full = (scores(model, size, texts, name).nats for size in (CONTEXT, None))
        assert (blocks - full).abs().max() < 1e-10


@pytest.mark.parametrize("block_size", [1, 2, 4, CONTEXT])
def test_probabilities_of_all_documents_add_up_to_one(model, block_size):
    """Those that end within two tokens, and the beginnings of all others."""
    ended = [text for n in range(3) for text in every_text(n)]
    longer = every_text(3)
    nats = [
        scores(model, block_size, ended, "chain_rule").nats[0],
        scores(model, block_size, longer, "chain_rule", end=None).nats[0],
    ]
    assert float((-torch.cat(nats)).exp().sum()) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("block_size", [2, 4])
def test_bounds_of_one_length_are_of_a_distribution(model, block_size):
    """Over all texts of some length, ended or not; over several, at the cost of their orders.

    Random orders that keep to the document are one in C(b, n) of all orders of its last block.
    """
    ended = [text for n in range(3) for text in every_text(n)]
    nats = scores(model, block_size, ended, "exact").nats[0]
    longer = scores(model, block_size, every_text(3), "exact", end=None).nats[0]
    assert 0.2 < float((-longer).exp().sum()) < 1.0

    def orders(positions: int) -> float:
        filled = (positions - 1) % block_size + 1
        return math.log(math.comb(block_size, filled))

    loose = nats + torch.tensor([orders(len(text) + 1) for text in ended]).double()
    total = (-loose).exp().sum() + (-longer - orders(3)).exp().sum()
    assert 0.05 < float(total) < 1.0


@pytest.mark.parametrize("block_size", [1, 2, 4, None])
def test_consistent_conditionals_have_their_likelihood(block_size):
    """The oracle of a law over four tokens: -ln of a beginning and its end, for every document."""
    joint = random_joint(3, 4)
    end = TOKENS[-1]
    denoiser, family = TableDenoiser(oracle(joint, 4)), table_family(block_size)
    texts = [list(t) for n in range(4) for t in itertools.product(TOKENS[:-1], repeat=n)]
    arrays = [np.array(text, dtype=np.int32) for text in texts]
    windows = cut_windows(
        arrays, ["x" * len(t) for t in texts], 4, family.process.vocabulary.clean, end=end
    )
    exact = []
    for text in texts:
        begins = (all_sequences(4)[:, : len(text) + 1] == torch.tensor([*text, end])).all(1)
        exact.append(-float(joint[begins].sum().log()))
    for name in ("exact", "any_order", "importance", "chain_rule"):
        nats = estimate(denoiser, family, windows, estimator=name, seed=0).nats
        assert (nats - torch.tensor(exact, dtype=torch.float64)).abs().max() < 1e-10, name
    endless = float(joint[(all_sequences(4) != end).all(1)].sum())
    assert sum(math.exp(-nats) for nats in exact) == pytest.approx(1.0 - endless, abs=1e-12)


# --- no leak of the length -----------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [4, CONTEXT])
@pytest.mark.parametrize("end", [None, END])
def test_a_token_costs_the_same_wherever_the_document_stops(model, block_size, end):
    text = documents((7,))[0]
    texts = [text[:n] for n in range(1, 8)]
    found = scores(model, block_size, texts, "chain_rule", end=end, attribute=True).token_nats()
    for n, nats in enumerate(found, start=1):
        assert (nats[:n] - found[-1][:n]).abs().max() < 1e-10


def test_a_full_sequence_is_given_its_length_unless_ends_are_scored(model):
    text = documents((7,))[0]
    nats = scores(model, None, [text[:3], text], "chain_rule", end=None, attribute=True)
    short, long = nats.token_nats()
    assert (short - long[:3]).abs().max() > 1e-3


def test_what_follows_is_masked_in_every_row_and_seen(model):
    """Every call of every estimator: all real positions, those after the end masked."""
    text = documents((5,))[0]
    family = tiny_family(4)
    seen: list[Tensor] = []
    original = model.hidden

    def watched(input_ids, context_ids, sigma, layout, *rest):
        seen.append(input_ids)
        assert layout.document_ids is None  # all eight positions are attended to
        return original(input_ids, context_ids, sigma, layout, *rest)

    model.hidden = watched
    try:
        for name in ("masked_count", "balanced", "time", "any_order", "chain_rule", "exact"):
            estimate(model, family, cut([text]), estimator=name, seed=0)
    finally:
        del model.hidden
    rows = torch.cat(seen)
    assert rows.shape[1] == 8
    assert (rows[:, 6:] == MASK).all()
    assert (rows[:, :6] != MASK).any(0).all()


# --- estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [4, None])
@pytest.mark.parametrize("name", ["masked_count", "balanced", "any_order", "time"])
def test_estimators_expect_the_enumerated_value(model, name, block_size):
    """By many copies: documents have noise of their own, so they are as good as replicates."""
    texts, copies = documents((0, 2, 5)), 60
    repeated = [text for text in texts for _ in range(copies)]
    exact = scores(model, block_size, texts, "exact")
    options = {"samples": 4} if name == "balanced" else {}
    found = scores(model, block_size, repeated, name, **options)
    for part in ("diffusion", "end_of_text"):
        nats = found.nats - found.parts["end_of_text"] if part == "diffusion" else found.parts[part]
        wanted = exact.parts[part][0]
        each = nats.view(8, 3, copies).transpose(1, 2).reshape(-1, 3)
        stderr = each.std(0) / math.sqrt(len(each))
        assert ((each.mean(0) - wanted).abs() < 4.5 * stderr + 1e-9).all(), part


def test_networks_that_see_the_noise_level_agree_by_count_and_by_time():
    model = tiny_model(seed=2, adaln=True, time_conditioning=True)
    family = tiny_family(4)
    windows = cut([text for text in documents((0, 2, 5)) for _ in range(25)])
    means, errors = [], []
    for name, options in (("masked_count", {}), ("balanced", {"samples": 4}), ("time", {})):
        bound = estimate(model, family, windows, estimator=name, seed=4, **options).bound()
        means.append(bound.mean)
        errors.append(bound.stderr)
    assert abs(means[0] - means[1]) < 4 * math.hypot(errors[0], errors[1])
    assert abs(means[0] - means[2]) < 4 * math.hypot(errors[0], errors[2])
    with pytest.raises(ConfigError) as error:
        estimate(model, family, windows, estimator="exact", seed=0)
    assert error.value.code == "time_conditioning"


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_enumeration_takes_a_row_per_set_however_many_blocks(model, block_size):
    """Two windows of whole blocks: all blocks of a window share its 2 ** b - 1 rows."""
    found = scores(model, block_size, documents((2 * CONTEXT,)), "exact", end=None)
    assert found.rows == 2 * (2**block_size - 1)
    assert found.replicates == 1
    assert found.bound().stderr == 0.0
    counted = scores(model, block_size, documents((2 * CONTEXT,)), "balanced", end=None)
    low, high = counted.bound().interval(0.999)
    assert low < found.bound().mean < high


def test_enumeration_says_what_it_would_cost(model):
    with pytest.raises(ConfigError, match=r"2 \*\* 16 sets of masked tokens per window"):
        scores(model, None, documents((16,)), "exact", end=None)
    with pytest.raises(ConfigError, match=r"2 \*\* 15 sets of masked tokens per block of 16"):
        scores(model, 16, documents((14,)), "exact")
    given = np.arange(16) >= 8  # a prompt is not enumerated
    windows = cut(documents((16,)), end=None, scored=[given])
    found = estimate(model, tiny_family(16), windows, estimator="exact", seed=0)
    assert found.rows == 2**8 - 1


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 3, 8])
def test_long_documents_end_once_in_their_last_window(stride):
    windows = cut(documents((20, 8, 0, 7)), length=8, stride=stride)
    assert windows.document_tokens.tolist() == [20, 8, 0, 7]
    assert windows.document_bytes.tolist() == [20, 8, 0, 7]
    last = [w for w in range(len(windows.tokens)) if int(windows.ends[w]) >= 0]
    assert windows.document[last].tolist() == [0, 1, 2, 3]
    for w in range(len(windows.tokens)):
        place = int(windows.ends[w])
        assert (windows.tokens[w] == END).tolist() == [
            i == place for i in range(len(windows.tokens[w]))
        ]
    scored = sum(
        len(tokens) if windows.scored is None else int(windows.scored[w].sum())
        for w, tokens in enumerate(windows.tokens)
    )
    assert scored == 20 + 8 + 0 + 7 + 4


def test_what_follows_stays_within_the_context():
    """Blocks of 3 leave one of 1 at the end of 16 tokens: no window is longer than that."""
    windows = with_rest(cut(documents((16, 14, 1)), end=None), tiny_family(3), CONTEXT)
    assert windows.lengths.tolist() == [16, 15, 3]
    assert with_rest(cut(documents((3,)), end=None), tiny_family(), CONTEXT).lengths.tolist() == [3]
    assert with_rest(cut(documents((3,))), tiny_family(), CONTEXT).lengths.tolist() == [16]


def test_a_window_that_overlaps_sees_the_text_before_its_end(model):
    text = documents((18,))[0]
    family = tiny_family(1)
    found = estimate(model, family, cut([text], length=8, stride=2), estimator="exact", seed=0)
    windows = [(0, 0, 8), (2, 8, 10), (4, 10, 12), (6, 12, 14), (8, 14, 16), (10, 16, 18)]
    whole, exact = [*text, END], 0.0
    for start, fresh, stop in [*windows, (11, 18, 19)]:
        seen = whole[start:stop]
        exact += one_by_one(model, seen, 1) - one_by_one(model, seen[: fresh - start], 1)
    assert float(found.nats[0, 0]) == pytest.approx(exact, abs=1e-10)


def test_a_prompt_is_not_scored_and_its_text_ends(model):
    whole = documents((7,))[0]
    mask = np.arange(7) >= 4
    windows = cut([whole], scored=[mask])
    found = estimate(model, tiny_family(2), windows, estimator="exact", seed=0)
    exact = sum(token_costs(model, [*whole, END], 2)[4:])
    assert float(found.nats[0, 0]) == pytest.approx(exact, abs=1e-10)
    assert found.windows.document_tokens.tolist() == [3]


@pytest.mark.parametrize(
    ("name", "options"),
    [("masked_count", {}), ("exact", {}), ("importance", {"orders": 2})],
    ids=["masked_count", "exact", "importance"],
)
@pytest.mark.parametrize("block_size", [4, None])
def test_batches_and_shards_do_not_matter(model, name, options, block_size):
    def nats(**settings) -> Estimates:
        return scores(model, block_size, documents((0, 3, 5)), name, **options, **settings)

    together = nats()
    assert ("end_of_text" in together.parts) == (name != "importance")
    assert (nats(batch_tokens=40).nats - together.nats).abs().max() < 1e-9
    shards = [nats(shard=(rank, 2)) for rank in range(2)]
    assert (sum(x.nats for x in shards) - together.nats).abs().max() < 1e-9


def test_nats_of_tokens_hold_the_end_and_nothing_after_it(model):
    found = scores(model, 4, documents(), "masked_count", attribute=True)
    for index, nats in enumerate(found.token_nats()):
        assert len(nats) == LENGTHS[index] + 1
        assert float(nats.sum()) == pytest.approx(float(found.nats[:, index].mean()), abs=1e-10)
        end = float(found.parts["end_of_text"][:, index].mean())
        assert float(nats[-1]) == pytest.approx(end, abs=1e-10)


# --- documents without a token, and refusals -----------------------------------------------------


def test_an_empty_document_costs_its_end(model):
    found = scores(model, 4, documents((0, 3)), "exact")
    alone = block_costs(model, [], [END], 4)[0]
    assert float(found.nats[0, 0]) == pytest.approx(alone, abs=1e-10)
    assert found.bound().mean == pytest.approx(float(found.nats.sum()) / 3, abs=1e-12)
    with pytest.raises(DataError, match=f"document 1 has no token.*{alone:.4f} nats"):
        found.document(0)
    empty: Estimates = scores(model, 4, documents((0, 0)), "exact")
    with refused(DataError, "no_token_to_score", "the text has no token to share"):
        empty.bound()
    with refused(DataError, "no_token_to_score", "no token to score"):
        scores(model, 4, documents((0, 0)), "exact", end=None)


@pytest.mark.parametrize("process", ["uniform", "hybrid"])
@pytest.mark.parametrize("block_size", [4, None])
def test_noise_without_masks_cannot_leave_tokens_open(process, block_size):
    kind = {"uniform": "udlm", "hybrid": "gidd"}[process]
    spec = {
        "process": process,
        "schedule": {"kind": "loglinear" if process == "uniform" else "hybrid"},
        "objective": {"kind": kind},
        "block_size": block_size,
    }
    family = build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED))
    model = tiny_model(adaln=True, time_conditioning=True)
    with pytest.raises(ConfigError) as error:
        estimate(model, family, cut(documents()), seed=0)
    assert error.value.code == "end_needs_masks"
    assert estimate(model, family, cut(documents(), end=None), seed=0).bound().is_bound


def test_a_saved_estimate_is_of_one_policy(model, tmp_path):
    family, path = tiny_family(4), tmp_path / "state"
    first = estimate(model, family, cut(documents()), seed=0, state=path)
    again = estimate(model, family, cut(documents()), seed=0, state=path)
    assert torch.equal(first.parts["end_of_text"], again.parts["end_of_text"])
    with refused(CheckpointError, "saved_with_another_text", "another text"):
        estimate(model, family, cut(documents(), end=None), seed=0, state=path)
