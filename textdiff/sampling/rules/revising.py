"""Rules that revise: under noise that replaces tokens, no token is final before the last call.

Such a rule may stop a row early, once its text has settled: the likeliest text given the canvas
has been the same for some calls, and its tokens are certain on average (adaptive stopping). The row
then becomes that text. Letters: R rows, S positions of the canvas, N open positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from textdiff.errors import ConfigError
from textdiff.sampling.rules.rule import Rule
from textdiff.section import torch

if TYPE_CHECKING:
    from torch import Tensor

    from textdiff.diffusion.family import Family
    from textdiff.diffusion.objectives import Prediction
    from textdiff.sampling.positions import Positions
    from textdiff.sampling.segment import Segment


class RevisingRule(Rule):
    """A rule that may change tokens again until its last call, and may stop early."""

    stable_calls: int | None = Field(
        None,
        ge=1,
        description="finish a row once its likeliest text has been the same for so many further "
        "calls; none makes all calls",
    )
    stable_entropy: float = Field(
        0.005,
        ge=0.0,
        description="and the mean entropy of its tokens given the canvas is at most this, in nats",
    )

    def suited(self, family: Family) -> Rule:
        if self.stable_calls is not None and not family.process.replaces_tokens:
            raise ConfigError(
                f"stable_calls stops the revision of tokens, and {family.process.name} noise "
                "leaves nothing to revise: a row ends when its last mask is revealed; leave it out",
                code="nothing_revised",
            )
        return self

    def revision(self, segment: Segment) -> Revision:
        """Return the rows of a segment that are to be revised, at first all."""
        return Revision(segment, self.stable_calls, self.stable_entropy)


class Revision:
    """Rows that are still revised, and how often their likeliest texts were repeated.

    Args:
        segment: what is filled.
        calls: repetitions after which a text is stable; None: it never is.
        entropy: largest mean entropy of a stable text.
    """

    def __init__(self, segment: Segment, calls: int | None, entropy: float):
        self.segment, self.calls, self.entropy = segment, calls, entropy
        self.open = ~segment.frozen  # [R, S]
        self.likeliest = torch.full(self.open.shape, -1)
        self.repeated = torch.zeros(len(self.open), dtype=torch.int64)  # [R]

    def positions(self) -> Positions:
        """Return the open positions of the rows that are still revised."""
        return self.segment.where(self.open & self.segment.places.now)

    @property
    def stops_early(self) -> bool:
        """True where stable rows end before the last call."""
        return self.calls is not None

    def end(
        self, positions: Positions, posterior: Prediction, t: Tensor, every: bool = False
    ) -> Tensor:
        """Write the likeliest texts of stable rows, or of every row; these are revised no more.

        Args:
            positions: all N that are revised.
            posterior: of their clean tokens given the canvas.
            t: [R] time of each row.
            every: whether all rows end here.

        Returns:
            [N] bool, positions of the rows that end.
        """
        if not (every or self.stops_early):
            return torch.zeros(len(positions), dtype=torch.bool)
        segment, row = self.segment, positions.row
        text = segment.draw(positions, posterior, t, controls=segment.controls.cold())
        ended = torch.ones_like(row, dtype=torch.bool)
        if not every:
            stable = self._stable(positions, text.cpu(), posterior)
            ended, self.open = stable[row], self.open & ~stable[:, None]
        chosen = segment.send(ended.nonzero().squeeze(1))
        segment.put(positions[ended], text[chosen])
        return ended

    def _stable(self, positions: Positions, text: Tensor, posterior: Prediction) -> Tensor:
        """Note the likeliest tokens [N]; return which rows are stable, [R] bool."""
        likeliest = self.likeliest.flatten().index_copy(0, positions.known, text)
        likeliest = likeliest.view_as(self.likeliest)
        same = (likeliest == self.likeliest).all(1)
        self.likeliest, self.repeated = likeliest, torch.where(same, self.repeated + 1, 0)

        def entropies(chunk: slice) -> Tensor:
            nats: Tensor = torch.special.entr(posterior.at(chunk).log_x0.exp()).sum(-1)
            return nats

        nats = self.segment.by_parts(len(positions), entropies).cpu()
        size = self.open.sum(1)
        total = torch.zeros(len(size), dtype=nats.dtype)
        total = total.index_add(0, positions.row, nats)
        assert self.calls is not None
        return (size > 0) & (self.repeated >= self.calls) & (total <= self.entropy * size)
