"""The one place where the drawing distribution departs from the model's.

Everything here acts after confidences were read, at the positions that are drawn and nowhere else,
in this order: hooks, repetition penalty, bans, constraint, temperature, top-k, top-p, min-p.
Letters: N drawn positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.errors import ConfigError
from textdiff.sampling.constraints import Constraint
from textdiff.sampling.context import Context, Scene
from textdiff.sampling.guidance import GuidedPrediction

Hook = Callable[[Context, Tensor], Tensor]
"""hook(context, log_x0 [N, V]) -> [N, V] log-weights; they need not be normalised, -inf forbids."""

COLDEST = 1e-9
"""Least temperature that a schedule reaches; smaller ones would overflow."""


@dataclass(frozen=True)
class Controls:
    """How the drawing distribution departs from the model's.

    Attributes:
        temperature: divides log-probabilities; 0 takes the most likely token. A pair (a, b) falls
            from a at time 1 to b at time 0, linearly in time.
        top_k: only the k most likely tokens; None: all.
        top_p: only the most likely tokens up to this much probability, the one that crosses it
            included (1: all).
        min_p: only tokens at least this share as likely as the likeliest (arXiv:2407.01082).
        repetition_penalty: log-probabilities of tokens that the row has elsewhere are multiplied by
            this (arXiv:1909.05858; its scores are raw logits, whose zero has no meaning).
        banned: token ids that are never drawn.
        end_token: is not drawn where text is given after it; None: there is no such token.
        min_new_tokens: tokens of an open end before an end token may be.
        hooks: the user's own; see `Hook`.
        constraint: what generated text has to look like; None: as it likes.
        scene: what surrounds the canvas; the block loop knows.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float | tuple[float, float] = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    banned: tuple[int, ...] = ()
    end_token: int | None = None
    min_new_tokens: int = 0
    hooks: tuple[Hook, ...] = ()
    constraint: Constraint | None = None
    scene: Scene | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for temperature in self._temperatures:
            if not 0.0 <= temperature < float("inf"):
                raise ConfigError(f"temperature {temperature}: give 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k}: give 1 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p {self.top_p}: give more than 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"min_p {self.min_p}: give a number from 0 to 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ConfigError(
                f"repetition_penalty {self.repetition_penalty}: give more than 0 (1 is none)"
            )
        if self.min_new_tokens < 0:
            raise ConfigError(f"min_new_tokens {self.min_new_tokens}: give 0 or more")

    @property
    def _temperatures(self) -> tuple[float, ...]:
        found = self.temperature
        return found if isinstance(found, tuple) else (found,)

    @property
    def neutral(self) -> bool:
        """Whether tokens are drawn from the model's distribution, ends of texts apart."""
        return replace(self, end_token=None, min_new_tokens=0) == Controls()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return max(self._temperatures) == 0.0

    def cold(self) -> "Controls":
        """The same controls, but the most likely token is taken."""
        return replace(self, temperature=0.0)

    def within(self, scene: Scene) -> "Controls":
        """The same controls on a canvas of which more is known."""
        return replace(self, scene=scene)

    def placed(self, context: Context) -> Context:
        """The context with what surrounds the canvas."""
        return replace(context, scene=self.scene)

    def shaped(self, log_x0: Tensor, context: Context | None = None) -> Tensor:
        """[N, V] log-weights before temperature and truncation.

        Raises:
            ConfigError: a hook left nothing to draw.
        """
        if context is None or not (
            self.hooks
            or self.banned
            or self.repetition_penalty != 1.0
            or self.end_token is not None
        ):
            return log_x0
        context = self.placed(context)
        for hook in self.hooks:
            log_x0 = _checked(hook, hook(context, log_x0), log_x0)
        if self.repetition_penalty != 1.0:
            log_x0 = self._penalised(log_x0, context)
        allowed = self.allowed(context)
        if allowed is None:
            return log_x0
        log_x0 = log_x0.where(allowed, -torch.inf)
        # Where the model knows no other token than banned ones, all others are alike.
        stuck = log_x0.amax(-1, keepdim=True) == -torch.inf
        return torch.where(stuck & allowed, 0.0, log_x0)

    def probabilities(self, log_x0: Tensor, context: Context | None = None) -> Tensor:
        """[N, V] float64 weights to draw from; they need not add up to one."""
        heat = self.heat(context, log_x0.device)
        return self.truncated(self.shaped(log_x0, context), heat)

    def truncated(self, log_weights: Tensor, heat: float | Tensor) -> Tensor:
        """[N, V] float64 weights after temperature and truncation.

        Args:
            log_weights: [N, V].
            heat: the temperature, or [N, 1] of them.
        """
        logits = log_weights.double()
        # The largest is 0, so that no temperature makes all of them infinite.
        logits = (logits - logits.amax(-1, keepdim=True)) / heat
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        weights = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, order = weights.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            kept = torch.zeros_like(before, dtype=torch.bool).scatter(
                -1, order, before < self.top_p
            )
            weights = weights.masked_fill(~kept, 0.0)
        if self.min_p > 0.0:
            least = self.min_p * weights.amax(-1, keepdim=True)
            weights = weights.masked_fill(weights < least, 0.0)
        return weights

    def log_probabilities(self, log_x0: Tensor, context: Context | None = None) -> Tensor:
        """[N, V] float64 log-probabilities of the clean token, for rules that need them whole."""
        if self.greedy:
            best = self.shaped(log_x0, context).argmax(-1, keepdim=True)
            return torch.full_like(log_x0, -torch.inf, dtype=torch.float64).scatter(-1, best, 0.0)
        weights = self.probabilities(log_x0, context)
        return (weights / weights.sum(-1, keepdim=True)).log()

    def applied(self, prediction: Prediction, context: Context) -> Prediction:
        """A prediction as rules that need it whole take it; its scores stay if nothing changes."""
        taken = Prediction(
            lambda: self.log_probabilities(prediction.log_x0, context),
            prediction.log_score if self.neutral else None,
            prediction.mixture,
        )
        if isinstance(prediction, GuidedPrediction):
            return prediction.reweighed(taken, self.neutral)
        return taken

    def allowed(self, context: Context) -> Tensor | None:
        """[N, V] bool, tokens that are not banned; None: all that are clean."""
        early = None
        if self.end_token is not None and context.scene is not None:
            early = context.place < (context.scene.tails + self.min_new_tokens)[context.row]
            early = early.to(context.canvas.device) if bool(early.any()) else None  # on the host
        if not self.banned and early is None:
            return None
        allowed = context.vocabulary.clean.repeat(len(context.positions), 1)
        allowed[:, list(self.banned)] = False
        if early is not None:
            allowed[:, self.end_token] &= ~early
        return allowed

    def heat(self, context: Context | None, device: torch.device) -> float | Tensor:
        """The temperature, or [N, 1] of them."""
        if not isinstance(self.temperature, tuple):
            return self.temperature
        first, last = self.temperature
        if context is None or first == last:
            return first
        t = context.t[context.row].double()
        return (last + (first - last) * t).clamp(min=COLDEST)[:, None].to(device)

    def _penalised(self, log_x0: Tensor, context: Context) -> Tensor:
        # What is no clean token is impossible and stays so, the mask among it.
        seen = context.counts(log_x0.shape[-1]) > 0
        penalised = torch.where(seen, log_x0 * self.repetition_penalty, log_x0)
        overflows = (log_x0 > -torch.inf) & ~penalised.isfinite()
        exact = log_x0.double() * self.repetition_penalty
        exact = exact.clamp(min=torch.finfo(torch.float64).min)
        return torch.where(overflows, exact, penalised.double())


def _checked(hook: Hook, found: Tensor, before: Tensor) -> Tensor:
    """What a hook returned.

    Raises:
        ConfigError: it cannot be drawn from.
    """
    name = getattr(hook, "__name__", type(hook).__name__)
    if not isinstance(found, Tensor) or found.shape != before.shape:
        shape = tuple(getattr(found, "shape", ()))
        raise ConfigError(
            f"hook {name} returned {type(found).__name__} {shape}; return log-weights of the shape "
            f"that it was given, {tuple(before.shape)}"
        )
    most = found.amax(-1)
    if not bool((most > -torch.inf).all() & (most < torch.inf).all()):
        raise ConfigError(
            f"hook {name} left a position without any token, or with an infinite or undefined "
            "log-weight; leave at least one finite"
        )
    return found
