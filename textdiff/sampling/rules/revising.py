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
        is_open = ~segment.frozen  # [R, S]
        self.size = is_open.sum(1)  # [R]
        # A row ends with its last mask, or else where it is stable.
        followed = not segment.process.replaces_tokens
        self.ledger = segment.places if followed else segment.ledger(is_open)
        self.over = segment.decided(torch.zeros_like(self.size, dtype=torch.bool))  # [R] stable
        self.likeliest = segment.decided(torch.full((is_open.numel(),), -1))
        self.repeated = segment.decided(torch.zeros_like(self.size))

    def positions(self) -> Positions:
        """Return the open positions of the rows that are still revised, for a call that begins."""
        return self.segment.where(self.ledger.begin())

    @property
    def none_left(self) -> bool:
        """True where no row is revised any more, as far as the CPU can tell without waiting."""
        return self.ledger.none_left

    def was_needed(self) -> bool:
        """Return whether the call that is queued now had anything to revise."""
        return bool(self.ledger.settle().any())

    def still(self, positions: Positions) -> Tensor | None:
        """Return which positions are revised indeed, [N] bool on the device; None: all."""
        if self.stops_early:
            return ~positions.of_rows(self.over)
        return self.segment.masked(positions)

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
        segment = self.segment
        ended = ~positions.of_rows(self.over)  # [N]
        if not (every or self.stops_early):
            return torch.zeros_like(ended)
        text = segment.draw(positions, posterior, t, controls=segment.controls.cold())
        if not every:
            stable = self._stable(positions, segment.decided(text), posterior) & ~self.over
            ended, self.over = positions.of_rows(stable), self.over | stable
            segment.places.ended = self.over if segment.ahead else None
            self.ledger.close(positions, ended)
        chosen = segment.chosen(positions, ended)
        segment.put(chosen.at, text[chosen.predicted], chosen.which)
        return ended

    def _stable(self, positions: Positions, text: Tensor, posterior: Prediction) -> Tensor:
        """Note the likeliest tokens [N]; return which rows are stable, [R] bool."""
        at, shape = positions.on(text.device), positions.shape
        likeliest = self.likeliest.index_copy(0, at, text)
        same = (likeliest == self.likeliest).view(shape).all(1)
        self.likeliest, self.repeated = likeliest, torch.where(same, self.repeated + 1, 0)

        def entropies(chunk: slice) -> Tensor:
            nats: Tensor = torch.special.entr(posterior.at(chunk).log_x0.exp()).sum(-1)
            return nats

        nats = self.segment.decided(self.segment.by_parts(len(positions), entropies))
        total = torch.zeros(shape[0], dtype=nats.dtype, device=nats.device)
        total = total.index_add(0, positions.rows_on(nats.device), nats)
        size = self.segment.decided(self.size)
        assert self.calls is not None
        return (size > 0) & (self.repeated >= self.calls) & (total <= self.entropy * size)
