"""Optional parts of steps: drafts, confidences and entropies.

Rules do not depend on them. A `Watch` stands between a rule and the network, keeps the last
prediction, and fills the optional parts of the steps that the rule yields:

    watch = Watch(denoise, process, segment.places, {"draft", "confidence"})
    for step in rule(replace(segment, denoise=watch)):
        step = watch.fill(step)

No token depends on them. Drafts cost the output layer at every masked position of the rows that are
called. Confidences and entropies cost nothing that the rule has not asked for.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import ForwardProcess
from textdiff.errors import ConfigError, closest
from textdiff.models.devices import on_device, to_device
from textdiff.sampling.open_places import OpenPlaces, widened
from textdiff.sampling.parts import by_parts
from textdiff.sampling.positions import Positions
from textdiff.sampling.segment import Denoise
from textdiff.sampling.step import Step

PARTS = ("draft", "confidence", "entropy")
"""Names of the optional parts."""


class Watch:
    """Predictor for one run of a rule that also fills the steps.

    Args:
        denoise: the network.
        process: forward process.
        places: open positions of the segment.
        parts: which of `PARTS` to fill.

    Raises:
        ConfigError: an unknown part.
    """

    def __init__(
        self, denoise: Denoise, process: ForwardProcess, places: OpenPlaces, parts: Collection[str]
    ):
        for name in set(parts) - set(PARTS):
            hint = closest(name, PARTS)
            raise ConfigError(f"steps have no part {name!r}; {hint}", code="unknown_part")
        self.denoise, self.process, self.places, self.parts = denoise, process, places, parts
        self.likely: Tensor | None = None  # [R, L] likeliest tokens, each row's of its last call

    def __call__(self, canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        """Return the predictions of the network, and keep them."""
        asked = positions
        if "draft" in self.parts:
            asked = widened(positions, self.places.on(canvas))
        self.prediction = prediction = self.denoise(canvas, t, asked)
        self.asked = asked
        if "draft" in self.parts:
            here = asked.on(canvas.device)
            likely = canvas if self.likely is None else self.likely
            best = by_parts(*self._shape(len(asked)), lambda s: prediction.at(s).log_x0.argmax(-1))
            self.likely = likely.flatten().index_copy(0, here, best).view_as(canvas)
        if len(asked) == len(positions):
            return prediction
        return prediction.at(on_device(canvas, self._rows(positions.known)))

    def fill(self, step: Step) -> Step:
        """Return the step with the parts that were asked for; NaN where nothing was predicted."""
        if "draft" in self.parts and self.likely is not None:
            still = to_device(self.places.on(step.canvas), step.canvas.device)
            step = replace(step, draft=torch.where(still, self.likely, step.canvas))
        wanted = [name for name in PARTS[1:] if name in self.parts and getattr(step, name) is None]
        if not wanted:
            return step
        whole = torch.full((len(wanted), len(step.changed)), torch.nan, dtype=torch.float64)
        known = self._known(step)
        whole[:, known] = self._numbers(step.canvas, step.changed[known], wanted).cpu()  # waits
        numbers: dict[str, Any] = dict(zip(wanted, whole.unbind(), strict=True))
        changes = replace(step.changes, **numbers)
        return replace(step, read=lambda: changes)

    def _known(self, step: Step) -> Tensor:
        """Return [N] bool, changed positions that were predicted and not noised again."""
        at = self._rows(step.changed).clamp(max=len(self.asked) - 1)
        known = self.asked.known[at] == step.changed
        if step.remasked is None:
            return known
        return known & ~torch.isin(step.changed, step.remasked)

    def _numbers(self, canvas: Tensor, positions: Tensor, wanted: Collection[str]) -> Tensor:
        """Return [parts, n] float64 numbers of tokens that were drawn; NaN where one is a mask."""
        drawn = canvas.flatten()[on_device(canvas, positions)][:, None]  # [n, 1]
        prediction = self.prediction.at(on_device(canvas, self._rows(positions)))

        def numbers(chunk: slice) -> Tensor:
            log_x0 = prediction.at(chunk).log_x0
            columns = []
            if "confidence" in wanted:
                columns.append(log_x0.gather(-1, drawn[chunk]).squeeze(-1).exp().double())
            if "entropy" in wanted:
                nats = torch.special.entr(log_x0.exp()).sum(-1, dtype=torch.float64)
                columns.append(nats)
            return torch.stack(columns, dim=1)  # [n, parts]

        whole = by_parts(*self._shape(len(positions)), numbers)
        return whole.where(drawn != self.process.mask_token_id, torch.nan).t()  # never drawn

    def _shape(self, count: int) -> tuple[int, int]:
        return count, len(self.process.vocabulary.clean)

    def _rows(self, positions: Tensor) -> Tensor:
        """Return the indices of the predictions at flat positions, on the CPU."""
        return torch.searchsorted(self.asked.known, positions)  # which rise
