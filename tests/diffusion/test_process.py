"""Identity 9, absorbing part: the posterior is Bayes' rule of the forward process."""

import itertools

import pytest
import torch
from exact_tables import CLEAN, EXCLUDED, MASK, ROWS
from torch import Tensor

from textdiff.diffusion import PROCESSES
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.processes import Absorbing

STATES = (*CLEAN, MASK)
CELLS = 40  # survival probabilities below are multiples of 1 / 40, so a grid of uniforms is exact
ALPHAS = [0.0, 0.1, 0.4, 0.5, 0.8, 1.0]


@pytest.fixture(scope="module")
def process():
    return Absorbing(Vocabulary.of(ROWS, MASK, [EXCLUDED]))


def test_every_registered_process_is_tested():
    assert set(PROCESSES) == {"absorbing", "uniform", "hybrid"}


def forward(process, x: int, alpha: float) -> Tensor:
    """[V] law of `corrupt` on one token, by walking a grid of uniforms."""
    u = ((torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS)[None]
    full = torch.full_like(u, alpha)
    noise = Noise(full, 1.0 - full, u, torch.ones_like(u))
    tokens = process.corrupt(torch.full((1, CELLS), x), noise)[0]
    return torch.bincount(tokens, minlength=ROWS).double() / CELLS


def point(x: int) -> Tensor:
    log_x0 = torch.full((1, ROWS), -torch.inf, dtype=torch.float64)
    log_x0[0, x] = 0.0
    return log_x0


def backward(process, log_x0: Tensor, xt: int, alpha_s: float, alpha_t: float) -> Tensor:
    at = torch.tensor([alpha_s], dtype=torch.float64), torch.tensor([alpha_t], dtype=torch.float64)
    return process.posterior(log_x0, torch.tensor([xt]), *at)[0]


def falling(count: int):
    """Survival probabilities at `count` times, earliest first, from which masks are possible."""
    return [c for c in itertools.combinations(reversed(ALPHAS), count) if c[-1] < 1.0]


def test_forward_law_is_survival_or_mask(process):
    for x, alpha in itertools.product(CLEAN, ALPHAS):
        law = forward(process, x, alpha)
        assert float(law[x]) == pytest.approx(alpha, abs=1e-12)
        assert float(law[MASK]) == pytest.approx(1.0 - alpha, abs=1e-12)


def test_two_forward_moves_are_one(process):
    """Q_{t|s} Q_{s|0} = Q_{t|0}; the mask absorbs."""
    for alpha_s, ratio in itertools.product((0.1, 0.5, 0.8, 1.0), (0.0, 0.5, 1.0)):
        for x in CLEAN:
            middle = forward(process, x, alpha_s)
            after = sum(middle[y] * forward(process, y, ratio) for y in STATES)
            exact = torch.zeros(ROWS, dtype=torch.float64)
            exact[x], exact[MASK] = alpha_s * ratio, 1.0 - alpha_s * ratio
            assert (after - exact).abs().max() < 1e-12


def test_posterior_is_bayes_for_every_pair(process):
    for alpha_s, alpha_t in falling(2):
        for x0 in CLEAN:
            at_s, at_t = forward(process, x0, alpha_s), forward(process, x0, alpha_t)
            for xt in (x0, MASK):
                if at_t[xt] == 0.0:
                    continue
                move = torch.zeros(ROWS, dtype=torch.float64)  # q(x_t | x_s) for every x_s
                for xs in STATES:
                    ratio = alpha_t / alpha_s if xs != MASK else 1.0
                    move[xs] = {xs: ratio, MASK: 1.0 - ratio if xs != MASK else 1.0}.get(xt, 0.0)
                bayes = at_s * move / (at_s * move).sum()
                found = backward(process, point(x0), xt, alpha_s, alpha_t)
                assert (found - bayes).abs().max() < 1e-12
                assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)


def test_two_backward_moves_are_one(process):
    """Chapman-Kolmogorov for the posterior, x_t -> x_s -> x_r against x_t -> x_r."""
    for alpha_r, alpha_s, alpha_t in falling(3):
        for x0 in CLEAN:
            for xt in (x0, MASK):
                first = backward(process, point(x0), xt, alpha_s, alpha_t)
                second = torch.stack(
                    [backward(process, point(x0), xs, alpha_r, alpha_s) for xs in range(ROWS)]
                )
                direct = backward(process, point(x0), xt, alpha_r, alpha_t)
                assert (first @ second - direct).abs().max() < 1e-12


def test_backward_moves_restore_the_forward_law(process):
    """Sum over x_t of q(x_s | x_t, x_0) q(x_t | x_0) = q(x_s | x_0)."""
    for alpha_s, alpha_t in falling(2):
        for x0 in CLEAN:
            at_t = forward(process, x0, alpha_t)
            back = sum(
                at_t[xt] * backward(process, point(x0), xt, alpha_s, alpha_t) for xt in (x0, MASK)
            )
            assert (back - forward(process, x0, alpha_s)).abs().max() < 1e-12


def test_no_time_passing_changes_nothing(process):
    for alpha in (0.0, 0.1, 0.5, 0.8):
        for xt in STATES:
            found = backward(process, point(CLEAN[1]), xt, alpha, alpha)
            assert float(found[xt]) == 1.0
            assert float(found.sum()) == 1.0


def test_going_back_to_the_start_gives_the_clean_token(process):
    log_x0 = torch.full((1, ROWS), -torch.inf, dtype=torch.float64)
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    log_x0[0, list(CLEAN)] = shares.log()
    for alpha_t in (0.0, 0.3, 0.9):
        found = backward(process, log_x0, MASK, 1.0, alpha_t)
        assert (found - log_x0[0].exp()).abs().max() < 1e-15
        assert float(found[MASK]) == 0.0
        for xt in CLEAN:  # visible tokens are carried over, whatever is predicted
            assert float(backward(process, log_x0, xt, 1.0, alpha_t)[xt]) == 1.0


def test_posterior_of_a_prediction_is_the_mixture_over_clean_tokens(process):
    log_x0 = torch.full((1, ROWS), -torch.inf, dtype=torch.float64)
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    log_x0[0, list(CLEAN)] = shares.log()
    mixed = sum(
        share * backward(process, point(x), MASK, 0.6, 0.2)
        for share, x in zip(shares, CLEAN, strict=True)
    )
    assert (backward(process, log_x0, MASK, 0.6, 0.2) - mixed).abs().max() < 1e-15


def test_rows_do_not_mix(process):
    alpha_s = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    alpha_t = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    log_x0 = torch.cat([point(x) for x in CLEAN])
    xt = torch.tensor([MASK, CLEAN[1], MASK])
    together = process.posterior(log_x0, xt, alpha_s, alpha_t)
    for row in range(3):
        alone = process.posterior(
            log_x0[row : row + 1], xt[row : row + 1], alpha_s[row : row + 1], alpha_t[row : row + 1]
        )
        assert torch.equal(together[row], alone[0])


def test_prior_is_all_masks(process):
    assert process.prior((2, 3)).tolist() == [[MASK] * 3] * 2
