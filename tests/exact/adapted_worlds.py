"""Three tokens, a real network whose every parameter is random, and its distribution by hand.

Each conditional is read off one dense forward pass over tokens and masks. The mask of who sees whom
and the place that predicts are written out here, not taken from the library.
"""

import itertools
import math
from functools import cache

import torch
from exact_tables import CLEAN, EXCLUDED, MASK, ROWS, all_sequences, masked
from torch import Tensor

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.models import TextDiffusionConfig, TextDiffusionModel

LENGTH = 4
TEXTS = all_sequences(LENGTH)


def network(seed: int = 3, **settings) -> TextDiffusionModel:
    config = TextDiffusionConfig(
        vocab_size=ROWS,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        conditioning_size=8,
        mask_token_id=MASK,
        excluded_token_ids=[EXCLUDED],
        **settings,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = TextDiffusionModel(config).double().eval()
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        model.output_layer.linear.weight.mul_(0.4)  # predictions with some entropy
    return model


def adapted(block_size: int | None, **objective) -> Family:
    spec = {
        "process": "absorbing",
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": "mdlm", **objective},
        "block_size": block_size,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, [EXCLUDED]))


class World:
    """The distribution of a network in a family, by enumeration."""

    def __init__(self, model: TextDiffusionModel, family: Family):
        self.model, self.family = model, family
        self.size = family.block_size or LENGTH
        self.log_p = cache(self._log_p)

    def _log_p(self, tokens: tuple[int, ...], start: int) -> Tensor:
        """[L, ROWS] what is predicted at each place of the block at `start`, after clean tokens."""
        end = min(start + self.size, LENGTH)
        at = torch.arange(end)
        block = at // self.size
        allowed = block[None, :] <= block[:, None]
        logits = dense(self.model, torch.tensor(tokens[:end]), allowed)
        if self.family.objective.shift:
            logits = logits[(at - 1).clamp(min=0)]
        log_p = torch.full_like(logits, -torch.inf)
        log_p[:, list(CLEAN)] = logits[:, list(CLEAN)].log_softmax(-1)
        return log_p

    def nats(self, z: Tensor, x: Tensor, position: int) -> float:
        start = position // self.size * self.size
        return -float(self.log_p(tuple(z.tolist()), start)[position, x[position]])

    def nelbo(self, x: Tensor) -> float:
        """Sum over blocks and subsets of B(k, n - k + 1) CE_S."""
        total = 0.0
        for start in range(0, LENGTH, self.size):
            places = range(start, min(start + self.size, LENGTH))
            n = len(places)
            for k in range(1, n + 1):
                for hit in itertools.combinations(places, k):
                    z = masked(x, hit)
                    cost = sum(self.nats(z, x, i) for i in hit)
                    total += cost / (k * math.comb(n, k))
        return total

    def likelihood(self, x: Tensor) -> float:
        """Of revealing one token after the other in a random order, block by block."""
        value = 1.0
        for start in range(0, LENGTH, self.size):
            orders = list(itertools.permutations(range(start, min(start + self.size, LENGTH))))
            chains = [
                sum(self.nats(masked(x, order[i:]), x, order[i]) for i in range(len(order)))
                for order in orders
            ]
            value *= sum(math.exp(-nats) for nats in chains) / len(orders)
        return value


@torch.no_grad()
def dense(model: TextDiffusionModel, tokens: Tensor, allowed: Tensor) -> Tensor:
    """[T, V] logits of one row under a mask of who sees whom, by the blocks' own weights."""
    from textdiff.models.attention import Attention
    from textdiff.models.block import BlockInputs
    from textdiff.models.layers import Rotary

    config = model.config
    rotary = Rotary(torch.arange(len(tokens)), config.head_dim, config.rope_theta, torch.float64)
    condition = None
    if config.adaln:
        level = torch.zeros(1, 1, dtype=torch.float64)
        condition = torch.nn.functional.silu(model.sigma_map(level))
    shared = BlockInputs(rotary, Attention("eager", allowed), condition, None)
    x = model.vocab_embed(tokens[None])
    for block in model.blocks:
        x = block(x, shared)
    return model.output_layer(x, condition)[0]
