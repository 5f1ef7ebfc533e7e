"""Teacher forcing of decoding rules: a rule writes a given text, and its chance is recorded.

A rule that picks positions from predictions alone, before it draws their tokens, can write a text x
in one way only. Let F(z) be the positions that it picks, and z_1 the prompt and masks. Then z_{s+1}
is the canvas z_s with x at F(z_s), and (arXiv:2603.01367)

    log p_rule(x) = sum_s sum_{i in F(z_s)} log p(x_i | z_s).

Tokens are drawn from p, controls included. That is exact also where several tokens are drawn at
once: the sampler does draw them independently. The engine and the rule are those of a generation,
and only the draw differs. Letters: R rows, W columns of the
texts, A active rows, S positions of their canvas, N positions of one draw.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import Prediction
from textdiff.errors import ConfigError
from textdiff.models import Denoiser
from textdiff.models.devices import to_device
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import log_chances
from textdiff.sampling.engine import Area, Engine
from textdiff.sampling.job import Job
from textdiff.sampling.positions import Positions
from textdiff.sampling.request import Request
from textdiff.sampling.rules import check_likelihood
from textdiff.sampling.segment import Segment
from textdiff.sampling.settings import SamplingConfig


@dataclass
class ForcedSegment(Segment):
    """A segment whose draws give the tokens of a text.

    Attributes:
        target: [A, S] tokens of the text.
        record: called with the N positions of a draw and their log-probabilities [N].
    """

    target: Tensor = field(kw_only=True)
    record: Callable[[Positions, Tensor], None] = field(kw_only=True)

    def draw(
        self,
        positions: Positions | Tensor,
        prediction: Prediction | Tensor,
        t: Tensor,
        step: int = 0,
        controls: Controls | None = None,
    ) -> Tensor:
        """Return the text's tokens, and record how likely it was to draw them."""
        at = self.at(positions)
        used, tokens = controls or self.controls, self.target.flatten()[at.on(self.target.device)]
        if isinstance(prediction, Tensor):
            prediction = Prediction(prediction)

        def chances(chunk: slice) -> Tensor:
            context = self.context(at[chunk], t)
            return log_chances(prediction.at(chunk).log_x0, tokens[chunk], used, context)

        together = used.constraint is not None
        self.record(at, self.by_parts(len(at), chances, together))
        return tokens


class ForcedEngine(Engine):
    """An engine whose rule writes given texts.

    Args:
        model: the network, in evaluation mode.
        family: process, schedule, objective and block size.
        request: the rows, whose open places are to be written, and how.
        texts: [R, W] tokens of the rows; fixed ones are not read.

    Raises:
        ConfigError: the texts of the rule have no exact likelihood; and see `Engine`.
    """

    def __init__(self, model: Denoiser, family: Family, request: Request, texts: Tensor):
        super().__init__(model, family, request)
        check_likelihood(self.rule)
        missing = self.width - texts.shape[1]
        self.texts = to_device(torch.nn.functional.pad(texts, (0, missing)), model.device)
        self.drawn: list[tuple[Tensor, Tensor]] = []

    def log_likelihoods(self) -> Tensor:
        """Return the log-probability of every token when its turn came, [R, W] float64.

        It is 0 at fixed places, and -inf where the rule never writes that token. Gradients flow to
        the network if they are enabled.

        Raises:
            ConfigError: a rule that does not write every place once.
        """
        for _ in self.walk():
            pass
        place, log_p = map(torch.cat, zip(*self.drawn, strict=True))
        self._check_once(place.cpu())
        rows, width = self.texts.shape
        flat = torch.zeros(rows * width, dtype=torch.float64, device=log_p.device)
        return flat.index_copy(0, to_device(place, log_p.device), log_p).view(rows, width)

    def _next_area(self) -> Area:
        area = super()._next_area()

        def record(positions: Positions, log_p: Tensor) -> None:
            self.drawn.append((positions.read(area.place), log_p))

        target = self.texts.flatten()[to_device(area.place, self.texts.device)]
        segment = ForcedSegment(**vars(area.segment), target=target, record=record)
        return Area(segment, area.active, area.place, area.written, area.ends)

    @property
    def _ahead(self) -> bool:
        """False: each draw is recorded as it is, with its positions and no others."""
        return False

    def _check_once(self, place: Tensor) -> None:
        """Refuse a rule whose walk is not the only way to the text."""
        times = torch.bincount(place, minlength=self.texts.numel())
        within = (torch.arange(self.width) < self.lengths[:, None]) & self.open
        if not torch.equal(times, within.flatten().long()):
            raise ConfigError(
                f"rule {self.rule.kind} says that its texts have an exact likelihood, but does not "
                "write every open position by one draw; set its `chance` to the reason",
                code="not_written_once",
            )


def rewriting(texts: Tensor, new: Tensor, lengths: Tensor) -> Job:
    """Return the job that writes some tokens of texts, given the others.

    Args:
        texts: [R, W] tokens.
        new: [R, W] bool, True at those that are written.
        lengths: [R] tokens of each text.
    """
    texts = texts.masked_fill(new, -1)
    prompts = [
        [None if token < 0 else token for token in row[:length]]
        for row, length in zip(texts.tolist(), lengths.tolist(), strict=True)
    ]
    return Job(prompts, [0] * len(prompts))


def policy_log_likelihood(
    model: Denoiser,
    family: Family,
    texts: Tensor,
    config: SamplingConfig,
    scored: Tensor | None = None,
) -> Tensor:
    """Return the log-probability that a rule writes each text, [R] float64, with gradients.

    The order of positions follows from the network too, but is a choice among whole numbers: the
    gradient is that of log p along the order as it is, which is right almost everywhere.

    Args:
        model: the network, without dropout.
        family: process, schedule, objective and block size.
        texts: [R, W] tokens.
        config: rule, steps, temperature, ...; a cache is not used.
        scored: [R, W] bool, False at fixed text; None: all is written.

    Raises:
        ConfigError: see `ForcedEngine`.
    """
    wanted = torch.ones_like(texts, dtype=torch.bool) if scored is None else scored
    job = rewriting(texts, wanted, torch.tensor([texts.shape[1]] * len(texts)))
    request = Request(job, config.merge(cache="off"))
    return ForcedEngine(model, family, request, texts).log_likelihoods().sum(1)
