"""Objective: the meaning of the network's output, and its contribution to the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.process import ForwardProcess, Vocabulary
from textdiff.section import Number, Section, Tensor, torch

if TYPE_CHECKING:
    from textdiff.diffusion import DiffusionConfig


class Prediction:
    """Predictions at N positions.

    Args:
        log_x0: [N, V] float32 (float64 for a float64 network) log-probabilities of the clean token,
            exactly -inf for ids that are not clean tokens; or a function that computes them.
        log_score: [N, V] log ratios for objectives that predict them, else None.
        mixture: whether `log_x0` is p(x_0 | x_t) and posteriors are to be averaged over it; else it
            is plugged into them.
        log_state: [N, V] log-probabilities of a clean token or the mask for objectives whose
            network may predict the mask, else None; `log_x0` is then conditional on a clean token.
    """

    def __init__(
        self,
        log_x0: Tensor | Callable[[], Tensor],
        log_score: Tensor | None = None,
        mixture: bool = False,
        log_state: Tensor | None = None,
    ):
        self._log_x0 = log_x0
        self.log_score = log_score
        self.mixture = mixture
        self.log_state = log_state

    @property
    def log_x0(self) -> Tensor:
        """[N, V] log-probabilities of the clean token."""
        if callable(self._log_x0):  # torch.compile cannot trace the lock of a cached_property
            self._log_x0 = self._log_x0()
        return self._log_x0

    def at(self, index: Tensor | slice) -> Prediction:
        """Return the predictions at [n] of the N positions; a slice copies nothing."""
        score, state = self.log_score, self.log_state
        return Prediction(
            lambda: self.log_x0[index],
            None if score is None else score[index],
            self.mixture,
            None if state is None else state[index],
        )


LATER = {"shift", "ar_weight", "scaled", "start"}
"""Options that were added to objectives; exports without them mean their defaults."""


class Objective(Section):
    """A way to turn raw logits into a prediction, and a prediction into a bound.

    A config holds an objective with its options; `on` returns it on a forward process, which the
    mathematics needs. Subclasses define at least `predict` and `nelbo_terms`.

    Attributes:
        processes: names of the forward processes that it is defined for.
        reason: why it is defined for no other.
        in_steps: whether its terms are defined for T steps.
        in_continuous_time: whether they are defined for continuous time.
        scores_all_positions: whether every position contributes to the bound, not only corrupted
            ones.
        shifted: whether the network reads clean tokens shifted right, from left to right.
        predicts_score: whether predictions hold ratios of probabilities, as scores are.
        heavy_tailed: whether terms may grow like the exponential of the network's outputs, or
            without limit near the clean end; else they grow like a cross-entropy.
        learns_schedules: whether it also trains the exponents of a learned schedule.
    """

    kind: str
    shift: bool = Field(
        False, description="the output at a position is about the next token, as in an AR network"
    )
    ar_weight: Number = Field(
        0.0,
        ge=0.0,
        description="weight of the next-token loss on the clean text of blocks, which then attends "
        "from left to right; it is not part of the bound",
    )

    processes: ClassVar[tuple[str, ...]]
    reason: ClassVar[str] = "its bound is that of other noise"
    in_steps: ClassVar[bool] = False
    in_continuous_time: ClassVar[bool] = True
    scores_all_positions: ClassVar[bool] = False
    shifted: ClassVar[bool] = False
    predicts_score: ClassVar[bool] = False
    heavy_tailed: ClassVar[bool] = True
    learns_schedules: ClassVar[bool] = False

    _process: ForwardProcess = PrivateAttr()

    # --- as a choice ---

    @property
    def trains_on_bound(self) -> bool:
        """True where training weights terms as the bound does."""
        return True

    def misfit(self, process: str) -> str | None:
        """Return why the objective does not go with a process; None: it does."""
        if process in self.processes:
            return None
        return (
            f"objective {self.kind} does not go with process {process} ({self.reason}); set "
            f"process: {' or '.join(self.processes)}"
        )

    def refusal(self, choices: DiffusionConfig) -> str | None:
        """Return why the objective does not go with the other choices; None: it does."""
        problem = self.misfit(choices.process)
        if problem:
            return problem
        if choices.timesteps is None and not self.in_continuous_time:
            return f"objective {self.kind} is diffusion in steps: set timesteps, for example 1000"
        if choices.timesteps is not None and not self.in_steps:
            return f"objective {self.kind} is in continuous time: set timesteps: null"
        if self.ar_weight and None in choices.block_sizes:
            return (
                "objective.ar_weight trains the clean text beside noisy blocks, which a whole "
                "sequence (block_size: null) does not have: set block_size, for example 16, or "
                "ar_weight: 0"
            )
        return None

    def to_export(self) -> dict[str, Any]:
        """Return the options as plain data; those that earlier versions lack only where set."""
        fields = type(self).model_fields
        unset = {
            name for name in LATER & set(fields) if getattr(self, name) == fields[name].default
        }
        return self.model_dump(mode="json", exclude=unset)

    # --- on a process ---

    def on(self, process: ForwardProcess) -> Objective:
        """Return the objective on a forward process; the options stay."""
        objective = self._implementation(process).model_construct(**dict(self))
        objective._process = process
        return objective

    def _implementation(self, process: ForwardProcess) -> type[Objective]:
        """Return the class that defines the objective for a process."""
        return type(self)

    @property
    def process(self) -> ForwardProcess:
        """The forward process."""
        # torch.compile cannot trace pydantic's own reading of private attributes.
        process: ForwardProcess = (self.__pydantic_private__ or {})["_process"]
        return process

    @property
    def vocabulary(self) -> Vocabulary:
        """Rows that are clean tokens."""
        return self.process.vocabulary

    @property
    def predicts_mask(self) -> bool:
        """True where the network may predict the mask, and so decides when a mask is revealed."""
        return False

    @property
    def first_input(self) -> int:
        """Token that precedes a text in the inputs of networks that are shifted."""
        return self.vocabulary.mask_token_id

    @property
    def has_own_start(self) -> bool:
        """True where texts whose first token is not scored are read without it."""
        return False

    @property
    def outputs(self) -> Tensor:
        """[V] bool: the network's outputs that predictions read."""
        return self.vocabulary.clean

    def positions(self, noise: Noise) -> Tensor:
        """Return [B, L] bool: positions that contribute to the bound."""
        return noise.scorable if self.scores_all_positions else noise.corrupted

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        """Read raw logits [N, V] at tokens xt [N] and survival probabilities alpha [N]."""
        return Prediction(clean_log_softmax(logits, self.vocabulary))

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        """Return [N] float64 nats: each position's share of the negative ELBO, weights included."""
        raise NotImplementedError

    def loss_terms(
        self, nelbo: Tensor, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise
    ) -> Tensor:
        """Return [N] terms that training minimises, made from the negative ELBO's."""
        return nelbo


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32, or in float64 where the network computes in it."""
    return logits if logits.dtype == torch.float64 else logits.float()


def clean_log_softmax(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return [N, V] log-probabilities over clean tokens, exactly -inf elsewhere."""
    return wide(logits).masked_fill(~vocabulary.clean, -torch.inf).log_softmax(-1)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Return [N] float64, values [N, V] at one column each."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1).double()
