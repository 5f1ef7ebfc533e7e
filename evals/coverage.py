"""Share of 95 % intervals that hold the exact value, on languages small enough to enumerate.

    python evals/coverage.py [--groups found further right] [--times 1 8] [--repetitions 400]

The settings are in `coverage.yaml`. Networks are tables: one row of logits per noisy sequence and
position, drifting with the noise level. `random` ones hold normal numbers times a scale, and are
confidently wrong. `near` ones are the true conditionals of a random language, plus normal numbers.
The exact bound is a sum over all noisy sequences, and over all steps or the nodes of a quadrature.
It shares only the objective's term at one position and q(x_t | x_0) with the estimators.
"""

import argparse
import itertools
import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.process import Vocabulary
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.estimators import build_estimator, default_estimator
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.stopping import least_replicates
from textdiff.likelihood.windows import Windows, cut_windows

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Setting:
    """A family, a network and texts.

    Attributes:
        process: `absorbing`, `uniform` or `hybrid`.
        objective: its kind and options.
        network: `random` or `near`.
        scale: standard deviation of the random part of the logits.
        tokens: clean tokens of the language.
        texts: lengths of the documents, in tokens.
        schedule: a schedule with its options; None: linear.
        timesteps: T; None: continuous time.
        block_size: tokens per block; None: the whole sequence.
        seed: of the network and the texts.
    """

    process: str
    objective: dict[str, Any]
    network: str
    scale: float
    tokens: int = 3
    texts: tuple[int, ...] = (3,)
    schedule: dict[str, Any] | None = None
    timesteps: int | None = None
    block_size: int | None = None
    seed: int = 0

    @property
    def length(self) -> int:
        return max(self.texts)

    def family(self) -> Family:
        own = {"kind": "hybrid", "uniform": 0.2} if self.process == "hybrid" else {}
        spec = {
            "process": self.process,
            "schedule": self.schedule or own or {"kind": "loglinear"},
            "objective": self.objective,
            "block_size": self.block_size,
            "timesteps": self.timesteps,
        }
        return build_family(spec, Vocabulary.of(self.tokens + 1, self.tokens))

    @property
    def language(self) -> Tensor:
        """[tokens ** length] probabilities of texts."""
        generator = torch.Generator().manual_seed(2000 + self.seed)
        return (
            (1.5 * torch.randn(self.tokens**self.length, generator=generator)).double().softmax(0)
        )

    def documents(self) -> list[Tensor]:
        """Beginnings of texts of the language; of any, where the network does not know it."""
        generator = torch.Generator().manual_seed(1000 + self.seed)
        if self.network == "random":
            return [torch.randint(self.tokens, (n,), generator=generator) for n in self.texts]
        drawn = self.language.multinomial(len(self.texts), True, generator=generator)
        powers = self.tokens ** torch.arange(self.length - 1, -1, -1)
        whole = drawn[:, None] // powers % self.tokens
        return [text[:n] for text, n in zip(whole, self.texts, strict=True)]


class Network:
    """What the estimators use of a denoiser, answered from a table.

    Args:
        setting: says which table; a position sees its own block and the clean ones before it.
        family: reads outputs, and gives q(x_t | x_0) where the true conditionals are wanted.
    """

    def __init__(self, setting: Setting, family: Family):
        rows, length = setting.tokens + 1, setting.length
        generator = torch.Generator().manual_seed(setting.seed)
        shape = (rows**length, length, rows)
        self.base, self.drift = setting.scale * torch.randn(
            2, *shape, generator=generator, dtype=torch.float64
        )
        self.joint = setting.language
        self.setting, self.family, self.length, self.rows = setting, family, length, rows
        self.powers = rows ** torch.arange(length - 1, -1, -1)
        self.config = SimpleNamespace(vocab_size=rows)
        self.context, self.time_conditioning = length, True
        self.self_conditioning = None
        self.device = torch.device("cpu")

    @staticmethod
    def output_layer(hidden: Tensor, condition: Tensor | None = None) -> Tensor:
        return hidden

    def logits(self, seen: Tensor, alpha: Tensor) -> Tensor:
        """[N, L, rows] at sequences `seen` [N, L] and survival probabilities [N]."""
        code = (seen * self.powers).sum(-1)
        found = self.base[code] + torch.sin(3.0 * alpha)[:, None, None] * self.drift[code]
        if self.setting.network == "near":
            found = found + self.truth(seen, alpha)
        return found

    def truth(self, seen: Tensor, alpha: Tensor) -> Tensor:
        """[N, L, rows] outputs of the best network for this objective."""
        kind = self.setting.objective["kind"]
        process, vocabulary = self.family.process, self.family.process.vocabulary
        texts = torch.cartesian_prod(*[torch.arange(self.setting.tokens)] * self.length)
        texts = texts.view(-1, self.length)
        m, b = process.shares(alpha)
        arrived = torch.where(seen == self.rows - 1, m[:, None], b[:, None])[:, None]  # [N, 1, L]
        each = arrived + alpha[:, None, None] * (seen[:, None] == texts)  # [N, X, L]
        other = (
            kind in ("udlm", "gidd", "sedd")
            or self.setting.objective.get("parameterization") == "plugged"
        )
        logs = each.clamp(min=1e-300).log()
        total = logs.sum(-1, keepdim=True) + self.joint.log()[:, None]
        total = total - logs if other else total.expand(logs.shape)
        mass = (total - total.amax(1, keepdim=True)).exp()  # [N, X, L]
        p = torch.zeros(*seen.shape, self.rows, dtype=torch.float64)
        for token in range(self.setting.tokens):
            p[..., token] = (mass * (texts == token)).sum(1)
        log_p = (p / p.sum(-1, keepdim=True)).clamp(min=1e-30).log()
        if kind != "sedd":
            return log_p
        if self.setting.process == "absorbing":
            return log_p + math.log(vocabulary.count)
        flat = alpha[:, None].expand(seen.shape).flatten()
        score = process.log_score(log_p.flatten(0, 1), seen.flatten(), flat)
        score = score / self.family.objective.scale(flat)[:, None]
        return score.view_as(p).nan_to_num(0.0, 0.0, 0.0)

    def hidden(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Any = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        count, length = input_ids.shape
        size = length if context_ids is None else (self.setting.block_size or length)
        clean = input_ids if context_ids is None else context_ids
        found = torch.zeros(count, length, self.rows, dtype=torch.float64)
        for block, start in enumerate(range(0, length, size)):
            seen = torch.full((count, self.length), self.rows - 1)
            seen[:, :start] = clean[:, :start]
            seen[:, start : start + size] = input_ids[:, start : start + size]
            here = slice(start, min(start + size, length))
            found[:, here] = self.logits(seen, torch.exp(-sigma.double()[:, block]))[:, here]
        found = found.flatten(0, 1)
        return (found if positions is None else found[positions]), None


def gauss(count: int) -> tuple[Tensor, Tensor]:
    """Times and weights of a quadrature on (0, 1) for logarithms and roots at both ends."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    s, weight = torch.from_numpy((nodes + 1.0) / 2.0), torch.from_numpy(weights / 2.0)
    angle = 0.5 * math.pi * s.square()
    t = angle.sin().square().clamp(1e-13, 1.0 - 1e-13)
    return t, weight * (2.0 * angle).sin() * math.pi * s


def exact_nats(setting: Setting, network: Network, x: Tensor, nodes: int = 160) -> float:
    """The bound of one document, by enumeration."""
    family, size = network.family, setting.block_size or len(x)
    if setting.timesteps:
        t = (torch.arange(setting.timesteps, dtype=torch.float64) + 1.0) / setting.timesteps
        weight = torch.full_like(t, 1.0 / setting.timesteps)
    else:
        t, weight = gauss(nodes)
    if setting.process != "hybrid" and not setting.timesteps and not family.process.by_token:
        family = Family(family.process, build_linear(), family.objective, family.block_size)
    total = 0.0
    for start in range(0, len(x), size):
        total += _block_nats(setting, network, family, x, start, size, t, weight)
    return total


def build_linear():
    from textdiff.diffusion.schedule import LogLinear

    return LogLinear()


def _block_nats(setting, network, family, x, start, size, t, weight) -> float:
    stop, mask = min(start + size, len(x)), setting.tokens
    here = x[start:stop]
    states = [
        {"absorbing": [int(token), mask], "uniform": list(range(mask))}.get(
            setting.process, list(range(mask + 1))
        )
        for token in here
    ]
    z = torch.tensor(list(itertools.product(*states)))  # [S, n]
    seen = torch.full((len(z), setting.length), mask)
    seen[:, :start] = x[:start]
    seen[:, start:stop] = z
    total = 0.0
    point = torch.nn.functional.one_hot(here, setting.tokens + 1).double()
    for i in range(len(t)):
        alpha = family.schedule.alpha(t[i : i + 1])
        chance = torch.ones(len(z), dtype=torch.float64)
        for j in range(len(here)):
            q = family.process.marginal(point[j : j + 1], alpha)[0]
            chance = chance * q[z[:, j]]
        told = family.known_alpha(alpha).expand(len(z))
        logits = network.logits(seen, told)[:, start:stop]
        alpha_s, per = None, family.schedule.elbo_weight(t[i : i + 1])
        if setting.timesteps:
            before = (t[i : i + 1] - 1.0 / setting.timesteps).clamp(min=0.0)
            alpha_s = family.schedule.alpha(before)
            per = setting.timesteps * (alpha_s - alpha) / (1.0 - alpha)
        shape = (z.numel(),)
        noise = Noise(
            alpha.expand(shape),
            1.0 - alpha.expand(shape),
            torch.zeros(shape).double(),
            per.expand(shape),
            None,
            None if alpha_s is None else alpha_s.expand(shape),
        )
        xt, x0 = z.flatten(), here.expand_as(z).flatten()
        prediction = family.objective.predict(logits.flatten(0, 1), xt, noise.alpha)
        terms = family.objective.nelbo_terms(prediction, x0, xt, noise).view_as(z)
        if not family.objective.scores_all_positions:
            terms = terms.where(z == mask, 0.0)
        total += float(weight[i] * (chance * terms.sum(-1)).sum())
    return total


def settings(path: Path = ROOT / "evals" / "coverage.yaml") -> dict[str, dict[str, Setting]]:
    """Return the settings by group and name."""
    groups = yaml.safe_load(path.read_text())
    return {
        group: {
            name: Setting(**{**keys, "texts": tuple(keys.get("texts", Setting.texts))})
            for name, keys in members.items()
        }
        for group, members in groups.items()
    }


GROUPS = settings()
FOUND, RIGHT = GROUPS["found"], GROUPS["right"]


def pool(
    setting: Setting, copies: int, seed: int, times: int = 1
) -> tuple[Estimates, Windows, Network]:
    """Estimates of copies of the texts, each with noise of its own, and the windows of one copy."""
    family = setting.family()
    network = Network(setting, family)
    name = default_estimator(family)
    texts = [x.to(torch.int32).numpy() for x in setting.documents()]
    clean = family.process.vocabulary.clean

    def cut(count: int) -> Windows:
        return cut_windows(texts * count, ["?"] * (len(texts) * count), setting.length, clean)

    one = cut(1)
    least = least_replicates(one, family, build_estimator(name).draws)
    found = estimate(
        network,
        family,
        cut(copies),
        seed=seed,
        replicates=least * times,
        batch_tokens=2**15,
    )
    return found, one, network


def measure(setting: Setting, repetitions: int, seed: int, times: int) -> dict[str, Any]:
    """Coverage of the intervals that are given, and how many are.

    Args:
        setting: what is estimated.
        repetitions: estimates with noise of their own.
        seed: of the noise.
        times: replicates, as a multiple of the smallest number.
    """
    found, one, network = pool(setting, repetitions, seed, times)
    tokens = int(one.document_tokens.sum())
    exact = sum(exact_nats(setting, network, x) for x in setting.documents()) / tokens
    documents, held, given, means, stated = len(setting.texts), 0, 0, [], []
    for r in range(repetitions):
        mine = slice(r * documents, (r + 1) * documents)
        bound = replace(
            found,
            parts={"diffusion": found.nats[:, mine]},
            windows=one,
            spread=found.spread[:, mine],
            draws=found.draws[mine],
        ).bound()
        low, high = bound.interval()
        given += bound.is_reliable
        held += low <= exact <= high
        means.append(bound.mean)
        stated.append(bound.stderr)
    error = float(np.std(means, ddof=1))
    return {
        "replicates": found.replicates,
        "draws": int(found.draws[:documents].sum()) * found.replicates,
        "exact_nats_per_token": exact,
        "relative_to_guessing": exact / math.log(setting.tokens),
        "bias_in_standard_errors": (float(np.mean(means)) - exact) / error * repetitions**0.5,
        "relative_error": error / exact,
        "median_stated_over_true_error": float(np.median(stated)) / error,
        "given": given / repetitions,
        "covered_of_given": held / given if given else None,
        "given_and_missed": (given - held) / repetitions,
    }


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--times", type=int, nargs="+", default=[1], help="replicates, multiples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "evals/results/coverage.json")
    arguments = parser.parse_args()
    rows = []
    for group in arguments.groups:
        for name, setting in GROUPS[group].items():
            for times in arguments.times:
                row = measure(setting, arguments.repetitions, arguments.seed, times)
                rows.append({"group": group, "name": name, "setting": asdict(setting), **row})
                covered = row["covered_of_given"]
                print(
                    f"{group:8}{name:36}{row['draws']:6} draws  "
                    f"{row['relative_to_guessing']:6.1f} x guessing  given {row['given']:.3f}  "
                    f"covered "
                    f"{'  -  ' if covered is None else format(covered, '.3f')}  missed "
                    f"{row['given_and_missed']:.3f}  bias {row['bias_in_standard_errors']:+.1f}",
                    flush=True,
                )
    record = {
        "what": "how often 95 % intervals of the default estimator are given, and hold the exact "
        "value where they are",
        "command": "python " + shlex.join(["evals/coverage.py", *sys.argv[1:]]),
        "seed": arguments.seed,
        "repetitions": arguments.repetitions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
