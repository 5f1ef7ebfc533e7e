"""Classifier-free guidance: away from what the network would write without the prompt.

Two predictions of every position, one conditional on the prompt and one not, are mixed in
log-probabilities (Sec. 3.1, arXiv:2412.10193; unsupervised, arXiv:2502.09992):

    log p = log p_without + (1 + w) (log p_with - log p_without), normalised.

The unconditional one has masks in place of the prompt. Networks of masked diffusion are trained on
masks; those of uniform noise are if training hid prompts (`diffusion.noise.prompt_dropout`). In
blocks, whole blocks before the first open place are left out and the text begins after them. No
network is trained on stretches of masks among finished blocks.

Where a mask is revealed, the two distributions of the clean token are mixed. Where noise has put a
token, those of the *next* token are (Sec. 3.1, arXiv:2412.10193), which no distribution of the
clean token gives. Letters: N positions, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import ForwardProcess
from textdiff.errors import ConfigError
from textdiff.models.devices import to_device
from textdiff.sampling.open_places import OpenPlaces
from textdiff.sampling.parts import lazily
from textdiff.sampling.positions import Positions
from textdiff.sampling.predictor import Predictor

Transition = Callable[[Prediction, Tensor], Tensor]
"""transition(prediction, tokens [N]) -> [N, V] float64 weights of the next tokens."""


def check_guidance(weight: float, family: Family) -> None:
    """Refuse guidance that is not defined.

    Raises:
        ConfigError: noise without a mask, and a network that was not trained with masked prompts.
    """
    if weight and not family.process.has_mask and not family.hides_prompts:
        raise ConfigError(
            f"guidance compares with a text whose prompt is masked, {family.process.name} noise "
            "has no mask, and this model was not trained with hidden prompts "
            "(diffusion.noise.prompt_dropout); leave guidance out, or use a hook",
            code="guidance_without_mask",
        )


class GuidedPredictor(Predictor):
    """Two predictors as one.

    Args:
        conditional: reads the prompt.
        unconditional: does not; of the same kind.
        given: [R, W] bool on the CPU, places of the prompt.
        weight: w; 0 is the conditional one alone.
    """

    def __init__(
        self, conditional: Predictor, unconditional: Predictor, given: Tensor, weight: float
    ):
        super().__init__(conditional.model, conditional.family)
        self.conditional, self.unconditional, self.weight = conditional, unconditional, weight
        self.given = given
        self.admitted = 0
        self.row = torch.zeros(0, dtype=torch.int64)  # [A] row of the job in each slot
        self.left_out = torch.zeros(0, dtype=torch.int64)  # [A] first tokens without the prompt

    @property
    def broken(self) -> Tensor:
        """[] bool on the device, of both."""
        return self.conditional.broken | self.unconditional.broken

    def admit(self, text: Tensor, finished: Tensor) -> None:
        """Add rows, in the order of the job."""
        size = self.family.block_size
        left_out = torch.zeros_like(finished) if size is None else finished // size * size
        self.row = torch.cat([self.row, self.admitted + torch.arange(len(text))])
        self.left_out = torch.cat([self.left_out, left_out])
        self.admitted += len(text)
        self.conditional.admit(text, finished)
        new = slice(len(self.row) - len(text), None)
        self.unconditional.admit(self._without_prompt(text, new), finished - left_out)
        self._count()

    def keep(self, order: Sequence[int]) -> None:
        """Drop the same rows of both."""
        self.row, self.left_out = self.row[list(order)], self.left_out[list(order)]
        self.conditional.keep(order)
        self.unconditional.keep(order)

    def enter(self, text: Tensor, starts: Tensor, widths: Tensor, frozen: Tensor) -> None:
        """Turn both to the next segment, at an earlier place where tokens are left out."""
        columns = starts[:, None] + torch.arange(int(widths.max()))  # [A, S]
        last = self.given.shape[1] - 1
        prompt = self.given[self.row[:, None], columns.clamp(max=last)] & (columns <= last)
        self.prompt = to_device(prompt, text.device)
        self.conditional.enter(text, starts, widths, frozen)
        masked = self._without_prompt(text, slice(None))
        self.unconditional.enter(masked, starts - self.left_out, widths, frozen)
        self._count()

    def follow(self, places: OpenPlaces) -> None:
        """Give both the open positions; this one keeps no predictions."""
        self.conditional.follow(places)
        self.unconditional.follow(places)

    def discount(self, needed: Tensor) -> None:
        """Leave rows out of the counts of both."""
        self.conditional.discount(needed)
        self.unconditional.discount(needed)
        self._count()

    def _predict(self, canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        """Predict by two network calls on the rows that own the positions."""
        mask = self.family.process.mask_token_id
        conditional = self.conditional(canvas, t, positions)
        unconditional = self.unconditional(canvas.masked_fill(self.prompt, mask), t, positions)
        self._count()

        def make(index: Tensor | slice) -> Prediction:
            pair = conditional.at(index), unconditional.at(index)
            return GuidedPrediction.of(*pair, self.weight)

        return lazily(len(positions), len(self.family.process.vocabulary.clean), make)

    def _without_prompt(self, text: Tensor, slots: slice) -> Tensor:
        """Return the text of some slots with the prompt masked, or left out."""
        width = text.shape[1]
        given = torch.nn.functional.pad(
            self.given[self.row[slots]], (0, max(0, width - self.given.shape[1]))
        )[:, :width]
        masked = text.masked_fill(to_device(given, text.device), self.family.process.mask_token_id)
        at = self.left_out[slots, None] + torch.arange(width)
        return masked.gather(1, to_device(at.clamp(max=width - 1), text.device))

    def _count(self) -> None:
        self._dtype = self.conditional._dtype
        self.calls = self.conditional.calls + self.unconditional.calls
        self.rows = self.conditional.rows + self.unconditional.rows


class GuidedPrediction(Prediction):
    """A mixture of two predictions of clean tokens, and the two, for those of noisy tokens.

    Args:
        log_x0: [N, V] the mixture.
        log_score: [N, V] its log ratios where the conditional one has any, else None. The
            probability of the mask, where it may be predicted, is that of the conditional one.
        conditional: of a network that reads the prompt.
        unconditional: of one that does not.
        weight: w of log p = log p_without + (1 + w) (log p_with - log p_without).
    """

    def __init__(
        self,
        log_x0: Tensor | Callable[[], Tensor],
        log_score: Tensor | None,
        conditional: Prediction,
        unconditional: Prediction,
        weight: float,
    ):
        super().__init__(log_x0, log_score, conditional.mixture, conditional.log_state)
        self.conditional, self.unconditional, self.weight = conditional, unconditional, weight

    @classmethod
    def of(
        cls, conditional: Prediction, unconditional: Prediction, weight: float
    ) -> "GuidedPrediction":
        """Mix two predictions."""
        score, log_x0 = conditional.log_score, mix(conditional.log_x0, unconditional.log_x0, weight)
        # The rate at which masks are revealed stays as it was; what they become is guided.
        score = None if score is None else log_x0 + score.logsumexp(-1, keepdim=True)
        return cls(log_x0, score, conditional, unconditional, weight)

    def at(self, index: Tensor | slice) -> "GuidedPrediction":
        """Return the predictions of some of the positions."""
        whole = super().at(index)
        pair = self.conditional.at(index), self.unconditional.at(index)
        return GuidedPrediction(lambda: whole.log_x0, whole.log_score, *pair, self.weight)

    def mixed(self, transition: Callable[[Prediction], Tensor]) -> Tensor:
        """Mix the two distributions of the next token into [N, V] float64 weights.

        Args:
            transition: weights [N, V] of the next token, from a prediction.
        """
        pair = [transition(one).double() for one in (self.conditional, self.unconditional)]
        conditional, unconditional = (w / w.sum(-1, keepdim=True) for w in pair)
        return mix(conditional.log(), unconditional.log(), self.weight).exp()

    def reweighed(self, drawn: Prediction, keep_scores: bool) -> "GuidedPrediction":
        """Return the guided prediction whose mixture controls have turned into `drawn`.

        Both predictions are multiplied by what the mixture was multiplied by. So a temperature or a
        ban acts once, on what is drawn at last, and not on each side of a quotient.

        Args:
            drawn: [N, V] log-probabilities of the clean token that take the mixture's place.
            keep_scores: whether scores are still those of the predictions.
        """
        before, after = self.log_x0.double(), drawn.log_x0
        factor = torch.where(before > -torch.inf, after - before, -torch.inf)
        fresh = (factor == -torch.inf).all(-1, keepdim=True)  # none of its tokens was left

        def changed(one: Prediction) -> Prediction:
            log_x0 = torch.where(fresh, after, one.log_x0.double() + factor).log_softmax(-1)
            return Prediction(log_x0, one.log_score if keep_scores else None, one.mixture)

        pair = changed(self.conditional), changed(self.unconditional)
        return GuidedPrediction(after, drawn.log_score, *pair, self.weight)


def next_token_weights(
    prediction: Prediction, tokens: Tensor, transition: Transition, process: ForwardProcess
) -> Tensor:
    """Return [N, V] weights of the next tokens; guided ones are mixed where a token was noised."""
    if not isinstance(prediction, GuidedPrediction) or not process.replaces_tokens:
        return transition(prediction, tokens)
    mixed = prediction.mixed(lambda one: transition(one, tokens))
    if not process.has_mask:
        return mixed
    masked = (tokens == process.mask_token_id)[:, None]
    return torch.where(masked, transition(prediction, tokens), mixed)


def mix(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Return [N, V] normalised mixtures of log-probabilities, -inf where either is."""
    possible = (conditional > -torch.inf) & (unconditional > -torch.inf)
    # Where they have no token in common, the conditional one is believed.
    possible = torch.where(possible.any(-1, keepdim=True), possible, conditional > -torch.inf)
    mixed = unconditional + (1.0 + weight) * (conditional - unconditional)
    mixed = torch.where(unconditional > -torch.inf, mixed, conditional)
    overflows = (possible & ~mixed.isfinite()).any(-1, keepdim=True)
    scaled = _scaled_mixture(conditional, unconditional, weight, possible)
    mixed = torch.where(overflows, scaled, mixed)
    return mixed.masked_fill(~possible, -torch.inf).log_softmax(-1)


def _scaled_mixture(
    conditional: Tensor, unconditional: Tensor, weight: float, possible: Tensor
) -> Tensor:
    """Return the same less its largest value, where the products above overflow."""
    dtype, scale = conditional.dtype, max(1.0, 1.0 + weight)
    conditional, unconditional = conditional.double(), unconditional.double()
    mixed = unconditional / scale + (1.0 + weight) / scale * (conditional - unconditional)
    mixed = torch.where(unconditional > -torch.inf, mixed, conditional / scale)
    mixed = mixed.where(possible, -torch.inf)
    mixed = (mixed - mixed.amax(-1, keepdim=True)) * scale
    return mixed.clamp(min=torch.finfo(dtype).min).to(dtype)
