"""The one place where the drawing distribution departs from the model's.

Everything here acts after confidences were read, at the positions that are drawn and nowhere else,
in this order: hooks, repetition penalty, bans, constraint, temperature, top-k, top-p, min-p.
Letters: N drawn positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.errors import ConfigError
from textdiff.models.devices import on_device, to_device
from textdiff.sampling.constraints import Constraint
from textdiff.sampling.context import Context, SegmentInfo
from textdiff.sampling.guidance import GuidedPrediction
from textdiff.sampling.settings import SamplingConfig

Hook = Callable[[Context, Tensor], Tensor]
"""hook(context, log_x0 [N, V]) -> [N, V] log-weights; they need not be normalised, -inf forbids."""

COLDEST = 1e-9
"""Least temperature that a schedule reaches; smaller ones would overflow."""


NEUTRAL = SamplingConfig()
SHAPING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options that change probabilities; `min_new_tokens` only says where a text may end."""


@dataclass(frozen=True, init=False)
class Controls:
    """Departures of the drawing distribution from the model's.

    Attributes:
        config: temperature, truncation, penalty and least length; its other options act elsewhere.
            A temperature of two numbers falls from the first at time 1 to the second at time 0,
            linearly in time. The penalty multiplies log-probabilities (arXiv:1909.05858; its
            scores are raw logits, whose zero has no meaning). Shares: arXiv:2407.01082.
        banned: token ids that are never drawn.
        end_tokens: tokens that end a text; they are not drawn where fixed text follows them.
        hooks: the user's own; see `Hook`.
        constraint: what generated text has to look like; None: anything.
        info: what surrounds the canvas; the engine adds it.

    Args:
        **options: options of `config` to change; the other arguments are the attributes.

    Raises:
        ConfigError: a value out of range.
    """

    config: SamplingConfig
    banned: tuple[int, ...]
    end_tokens: tuple[int, ...]
    hooks: tuple[Hook, ...]
    constraint: Constraint | None
    info: SegmentInfo | None = field(compare=False, repr=False)

    def __init__(
        self,
        config: SamplingConfig = NEUTRAL,
        *,
        banned: tuple[int, ...] = (),
        end_tokens: tuple[int, ...] = (),
        hooks: tuple[Hook, ...] = (),
        constraint: Constraint | None = None,
        info: SegmentInfo | None = None,
        **options: Any,
    ):
        config = config.merge(**options) if options else config
        values = (config, banned, end_tokens, hooks, constraint, info)
        for item, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, item.name, value)

    @property
    def neutral(self) -> bool:
        """True where tokens are drawn from the model's distribution, ends of texts apart."""
        changed = [getattr(self.config, n) != getattr(NEUTRAL, n) for n in SHAPING]
        return not (any(changed) or self.banned or self.hooks or self.constraint)

    @property
    def greedy(self) -> bool:
        """True where the most likely token is taken."""
        return max(self.config.temperatures) == 0.0

    def tempered(self, temperature: float) -> "Controls":
        """Return the same controls at another temperature."""
        return replace(self, config=self.config.merge(temperature=temperature))

    def cold(self) -> "Controls":
        """Return the same controls, taking the most likely token."""
        return self.tempered(0.0)

    def within(self, info: SegmentInfo) -> "Controls":
        """Return the same controls, knowing what surrounds the canvas."""
        return replace(self, info=info)

    def placed(self, context: Context) -> Context:
        """Return the context with what surrounds the canvas."""
        return replace(context, info=self.info)

    def shaped(self, log_x0: Tensor, context: Context | None = None) -> Tensor:
        """Return log-weights [N, V] before temperature and truncation.

        Raises:
            ConfigError: a hook left nothing to draw.
        """
        if context is None or not (
            self.hooks or self.banned or self.config.repetition_penalty != 1.0 or self.end_tokens
        ):
            return log_x0
        context = self.placed(context)
        for hook in self.hooks:
            log_x0 = _checked(hook, hook(context, log_x0), log_x0)
        if self.config.repetition_penalty != 1.0:
            log_x0 = self._penalised(log_x0, context)
        allowed = self.allowed(context)
        if allowed is None:
            return log_x0
        log_x0 = log_x0.where(allowed, -torch.inf)
        # Where only banned tokens are possible, all others are alike.
        stuck = log_x0.amax(-1, keepdim=True) == -torch.inf
        return torch.where(stuck & allowed, 0.0, log_x0)

    def probabilities(self, log_x0: Tensor, context: Context | None = None) -> Tensor:
        """Return float64 weights [N, V] to draw from; they need not add up to one."""
        temperature = self.temperature(context, log_x0.device)
        return self.truncated(self.shaped(log_x0, context), temperature)

    def truncated(self, log_weights: Tensor, temperature: float | Tensor) -> Tensor:
        """Return float64 weights [N, V] after temperature and truncation.

        Args:
            log_weights: [N, V].
            temperature: the temperature, or [N, 1] of them.
        """
        logits = log_weights.double()
        # The largest is 0, so that no temperature makes all of them infinite.
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        top_k, top_p, share = (getattr(self.config, name) for name in SHAPING[1:4])
        if top_k is not None and top_k < logits.shape[-1]:
            smallest = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        weights = logits.softmax(-1)
        if top_p < 1.0:
            ordered, order = weights.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            kept = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before < top_p)
            weights = weights.masked_fill(~kept, 0.0)
        if share > 0.0:
            least = share * weights.amax(-1, keepdim=True)
            weights = weights.masked_fill(weights < least, 0.0)
        return weights

    def log_probabilities(self, log_x0: Tensor, context: Context | None = None) -> Tensor:
        """Return float64 log-probabilities [N, V] of the clean token, for rules that need all."""
        if self.greedy:
            best = self.shaped(log_x0, context).argmax(-1, keepdim=True)
            return torch.full_like(log_x0, -torch.inf, dtype=torch.float64).scatter(-1, best, 0.0)
        weights = self.probabilities(log_x0, context)
        return (weights / weights.sum(-1, keepdim=True)).log()

    def applied(self, prediction: Prediction, context: Context) -> Prediction:
        """Return a prediction for rules that need it whole; its scores stay if nothing changes."""
        taken = Prediction(
            lambda: self.log_probabilities(prediction.log_x0, context),
            prediction.log_score if self.neutral else None,
            prediction.mixture,
        )
        if isinstance(prediction, GuidedPrediction):
            return prediction.reweighed(taken, self.neutral)
        return taken

    def allowed(self, context: Context) -> Tensor | None:
        """Return the tokens that are not banned, [N, V] bool; None: all clean ones."""
        early = None
        if self.end_tokens and context.info is not None:
            early = context.before(context.info.tails + self.config.min_new_tokens)
        if not self.banned and early is None:
            return None
        clean = context.vocabulary.clean
        allowed = clean.index_fill(0, on_device(clean, self.banned), False)  # [V]
        if early is None:
            return allowed.expand(len(context.at), -1)
        ends = torch.zeros_like(clean).index_fill(0, on_device(clean, self.end_tokens), True)
        return allowed & ~(ends & early[:, None])

    def temperature(self, context: Context | None, device: torch.device) -> float | Tensor:
        """Return the temperature, or [N, 1] of them."""
        first, last = self.config.temperatures
        if context is None or first == last:
            return first
        t = context.at.of_rows(context.t).double()
        return to_device((last + (first - last) * t).clamp(min=COLDEST)[:, None], device)

    def _penalised(self, log_x0: Tensor, context: Context) -> Tensor:
        # Tokens that are not clean are impossible and stay so, the mask among it.
        seen, penalty = context.counts(log_x0.shape[-1]) > 0, self.config.repetition_penalty
        penalised = torch.where(seen, log_x0 * penalty, log_x0)
        overflows = (log_x0 > -torch.inf) & ~penalised.isfinite()
        exact = log_x0.double() * penalty
        exact = exact.clamp(min=torch.finfo(torch.float64).min)
        return torch.where(overflows, exact, penalised.double())


def _checked(hook: Hook, weights: Tensor, before: Tensor) -> Tensor:
    """Return the log-weights of a hook.

    Raises:
        ConfigError: it cannot be drawn from.
    """
    name = getattr(hook, "__name__", type(hook).__name__)
    if not isinstance(weights, Tensor) or weights.shape != before.shape:
        shape = tuple(getattr(weights, "shape", ()))
        raise ConfigError(
            f"hook {name} returned {type(weights).__name__} {shape}; return log-weights of the "
            f"shape that it was given, {tuple(before.shape)}"
        )
    most = weights.amax(-1)
    if not bool((most > -torch.inf).all() & (most < torch.inf).all()):
        raise ConfigError(
            f"hook {name} left a position without any token, or with an infinite or undefined "
            "log-weight; leave at least one finite"
        )
    return weights
