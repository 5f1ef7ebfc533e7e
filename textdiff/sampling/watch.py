"""Optional parts of steps: drafts, confidences and entropies.

Rules do not depend on them. A `Watch` stands between a rule and the network, keeps the last
prediction, and fills the optional parts of the steps that the rule yields:

    watch = Watch(denoise, process, frozen, {"draft", "confidence"})
    for step in rule(replace(segment, denoise=watch)):
        step = watch.fill(step)

No token depends on them. Drafts cost the output layer at every masked position of the rows that are
called. Confidences and entropies cost nothing that the rule has not asked for.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import ForwardProcess
from textdiff.errors import ConfigError, closest
from textdiff.sampling.previous import open_places, widened
from textdiff.sampling.segment import Denoise, Step

PARTS = ("draft", "confidence", "entropy")
"""Names of the optional parts."""


class Watch:
    """Predictor for one run of a rule that also fills the steps.

    Args:
        denoise: the network.
        process: forward process.
        frozen: [R, L] bool on the CPU.
        parts: which of `PARTS` to fill.

    Raises:
        ConfigError: an unknown part.
    """

    def __init__(
        self, denoise: Denoise, process: ForwardProcess, frozen: Tensor, parts: Collection[str]
    ):
        for name in set(parts) - set(PARTS):
            hint = closest(name, PARTS)
            raise ConfigError(f"steps have no part {name!r}; {hint}", code="unknown_part")
        self.denoise, self.process, self.frozen, self.parts = denoise, process, frozen, parts
        self.likely: Tensor | None = None  # [R, L] likeliest tokens, each row's of its last call

    def __call__(self, canvas: Tensor, t: Tensor, positions: Tensor) -> Prediction:
        """Return the predictions of the network, and keep them."""
        asked = positions
        if "draft" in self.parts:
            asked = widened(positions, open_places(canvas, self.frozen, self.process))
        prediction = self.denoise(canvas, t, asked)
        self.sorted, order = asked.sort()
        self.order, self.prediction = order.to(canvas.device), prediction
        if "draft" in self.parts:
            here = asked.to(canvas.device)
            likely = canvas if self.likely is None else self.likely
            best = prediction.log_x0.argmax(-1)
            self.likely = likely.flatten().index_copy(0, here, best).view_as(canvas)
        if len(asked) == len(positions):
            return prediction
        return prediction.at(self._rows(positions))

    def fill(self, step: Step) -> Step:
        """Return the step with the parts that were asked for; NaN where nothing was predicted."""
        if "draft" in self.parts and self.likely is not None:
            still = open_places(step.canvas, self.frozen, self.process)
            draft = torch.where(still, self.likely, step.canvas)
            step = replace(step, draft=draft)
        if "confidence" in self.parts or "entropy" in self.parts:
            at = torch.searchsorted(self.sorted, step.changed).clamp(max=len(self.sorted) - 1)
            now = step.canvas.flatten()[step.changed.to(step.canvas.device)]
            drawn = (now != self.process.mask_token_id).cpu()  # no mask is ever drawn
            if step.remasked is not None:
                drawn = drawn & ~torch.isin(step.changed, step.remasked)
            known = (self.sorted[at] == step.changed) & drawn
            log_x0 = self.prediction.log_x0[self.order[at[known].to(self.order.device)]]
            if "confidence" in self.parts:
                tokens = now[known.to(now.device)]
                chance = log_x0.gather(-1, tokens[:, None]).squeeze(-1).exp()
                step = replace(step, confidence=_spread(chance, known))
            if "entropy" in self.parts and step.entropy is None:
                nats = torch.special.entr(log_x0.exp()).sum(-1, dtype=torch.float64)
                step = replace(step, entropy=_spread(nats, known))
        return step

    def _rows(self, positions: Tensor) -> Tensor:
        """Return the indices of the predictions at positions."""
        return self.order[torch.searchsorted(self.sorted, positions).to(self.order.device)]


def _spread(values: Tensor, known: Tensor) -> Tensor:
    """Return values [N] float64 on the CPU where known, NaN elsewhere."""
    whole = torch.full(known.shape, torch.nan, dtype=torch.float64)
    whole[known] = values.double().cpu()
    return whole
