"""Distance of texts drawn under a pattern from matching texts of the model.

    python evals/patterns.py

A toy whose every number is known: a random joint distribution of 4 places and 3 letters, of
log-weights with deviation 1.5, and a network that returns its exact conditionals. For each pattern
the distribution that `--regex` draws from is enumerated, with one token per call in random order
(`first_hitting`) and with all tokens in one call (`ancestral` in one step), and its total variation
distance from p(text | match) is printed, over 20 joints. Written to `evals/results/patterns.json`.
"""

import json
import re
from datetime import UTC, datetime
from itertools import permutations, product
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results" / "patterns.json"
LETTERS, PLACES, JOINTS = "abc", 4, 20
PATTERNS = ("a*b?[ac]*", "a(aac|bbb|cca)|b...", "(ab|ba)..|ccc.", "[ab]+c", "...a|aaab")
TEXTS = ["".join(text) for text in product(LETTERS, repeat=PLACES)]


def joint(seed: int) -> Tensor:
    """[3 ** 4] probabilities of the texts."""
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(len(TEXTS), generator=generator, dtype=torch.float64)).softmax(0)


def together(p: Tensor, match: Tensor) -> Tensor:
    """All tokens in one call: the product of their marginals given a match."""
    weights = torch.ones_like(p)
    for place in range(PLACES):
        for letter in LETTERS:
            here = torch.tensor([text[place] == letter for text in TEXTS])
            weights[here] *= p[here].sum()
    return weights.where(match, 0.0) / weights[match].sum()


def one_by_one(p: Tensor, match: Tensor) -> Tensor:
    """One token per call in random order: its conditional among what can still match."""
    weights = torch.zeros_like(p)
    for index in match.nonzero().squeeze(1).tolist():
        text = TEXTS[index]
        for order in permutations(range(PLACES)):
            agree, chance = torch.ones(len(TEXTS), dtype=torch.bool), 1.0
            for place in order:
                mass = {}
                for letter in LETTERS:
                    here = agree & torch.tensor([other[place] == letter for other in TEXTS])
                    mass[letter] = float(p[here].sum()) if bool((here & match).any()) else 0.0
                chance *= mass[text[place]] / sum(mass.values())
                agree &= torch.tensor([other[place] == text[place] for other in TEXTS])
            weights[index] += chance / 24.0
    return weights


def main() -> None:
    rows = []
    for pattern in PATTERNS:
        match = torch.tensor([re.fullmatch(pattern, text) is not None for text in TEXTS])
        row: dict[str, object] = {"pattern": pattern, "texts": int(match.sum())}
        for name, drawn in (("one_by_one", one_by_one), ("together", together)):
            found = []
            for seed in range(JOINTS):
                p = joint(seed)
                wanted = p.where(match, 0.0) / p[match].sum()
                found.append(0.5 * float((drawn(p, match) - wanted).abs().sum()))
            row[name] = {"mean": sum(found) / JOINTS, "least": min(found), "most": max(found)}
        rows.append(row)
        print(row)
    record = {
        "what": "total variation of texts under a pattern from the model's own given a match",
        "command": "python evals/patterns.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "joints": JOINTS,
        "results": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
