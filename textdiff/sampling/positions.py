"""Positions of a canvas, of which the CPU holds how many each row has, but not always which ones.

Where the network chooses what is revealed, the choice is made on its device. The next call needs
only the shape of the rest from the CPU, and that follows from counts. So the CPU does not wait for
the positions themselves until they are read. Letters: A rows, S positions of the canvas, N of
these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from textdiff.models.devices import to_device


@dataclass(frozen=True, eq=False)
class Positions:
    """N positions of a canvas, row by row.

    Attributes:
        flat: [N] indices into the flat canvas, on the CPU or on its device.
        row: [N] CPU, row of each.
        shape: A and S.
    """

    flat: Tensor
    row: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(flat: "Tensor | Positions", canvas: Tensor) -> "Positions":
        """Return rising flat CPU positions [N] of a canvas [A, S], with their rows."""
        if isinstance(flat, Positions):
            return flat
        rows, width = canvas.shape
        return Positions(flat, flat // width, (rows, width))

    @staticmethod
    def where(chosen: Tensor) -> "Positions":
        """Return the positions that are chosen, from [A, S] bool on the CPU."""
        return Positions.of(chosen.flatten().nonzero().squeeze(1), chosen)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: Tensor | slice) -> "Positions":
        """Return some of them, by a slice or by indices or a mask on the CPU."""
        if isinstance(index, slice) and index == slice(None):
            return self
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        row = self.row[index]
        if isinstance(index, Tensor):
            index = to_device(index, self.flat.device)
        return Positions(self.flat[index], row, self.shape)

    @cached_property
    def known(self) -> Tensor:
        """[N] the flat positions on the CPU, which may wait for the device."""
        return self.flat.cpu()

    @cached_property
    def number(self) -> Tensor:
        """[A] CPU, how many each row has."""
        return torch.bincount(self.row, minlength=self.shape[0])

    @property
    def column(self) -> Tensor:
        """[N] column of each, where `flat` is."""
        return self.flat % self.shape[1]

    def on(self, device: torch.device) -> Tensor:
        """Return the flat positions on the device of the canvas, [N]; they are sent there once."""
        sent: dict[torch.device, Tensor] = self.__dict__.setdefault("_sent", {})
        if device not in sent:
            sent[device] = to_device(self.flat, device)
        return sent[device]

    def after(self, begins: Tensor) -> Tensor:
        """Return [N] begins [N], from the CPU, plus the columns, where `flat` is."""
        return to_device(begins, self.flat.device) + self.column

    def read(self, table: Tensor, device: torch.device | None = None) -> Tensor:
        """Return the entries of a table [A, S] of the CPU, [N] where `flat` is or on a device."""
        entries = to_device(table, self.flat.device).flatten()[self.flat]
        return entries if device is None else to_device(entries, device)

    def entries(self, table: Tensor) -> Tensor:
        """Return the entries of a table [A, S], [N] where it is."""
        return table.flatten()[self.on(table.device)]

    def replaced(self, table: Tensor, values: Tensor, which: Tensor | None = None) -> Tensor:
        """Return a table [A, S] with values [N] at these positions, or where `which` [N] says."""
        if which is not None:
            values = torch.where(which, values, self.entries(table))
        return table.flatten().index_copy(0, self.on(table.device), values).view_as(table)

    def spread(self, values: Tensor) -> Tensor:
        """Return [A, S] values [N] at these positions and -inf elsewhere, on the values' device."""
        size = self.shape[0] * self.shape[1]
        table = values.new_full((size,), -torch.inf)
        return table.index_copy(0, self.on(values.device), values).view(self.shape)

    def ranked(self, keys: Tensor) -> Tensor:
        """Return the columns of each row by falling keys [N], [A, S]; equal ones in their order."""
        return self.spread(keys).argsort(dim=1, descending=True, stable=True)

    def leading(self, order: Tensor, number: Tensor) -> Tensor:
        """Return which of them come first in their rows, [N] bool where `order` is.

        Args:
            order: [A, S] columns of each row, on the CPU or on the device.
            number: [A] on the CPU or there, how many of each row come first; no more than it has.
        """
        first = torch.arange(self.shape[1], device=number.device) < number[:, None]
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen = chosen.scatter(1, order, to_device(first, order.device))
        return chosen.flatten()[self.on(order.device)]

    def first(self, order: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of those that come first in their rows, and of the others.

        Args:
            order: [A, S] columns of each row, on the CPU or on the device.
            number: [A] CPU, how many of each row come first; no more than it has.
        """
        others = ~self.leading(order, number)
        ranked = others.byte().argsort(stable=True)  # both in their order, and of known lengths
        count = int(number.sum())
        return ranked[:count], ranked[count:]

    def count(self, which: Tensor) -> Tensor:
        """Return how many of each row `which` [N] bool names, [A] int64 where it is."""
        zero = torch.zeros(self.shape[0], dtype=torch.int64, device=which.device)
        return zero.index_add(0, self.rows_on(which.device), which.long())

    def rows_on(self, device: torch.device) -> Tensor:
        """Return the rows on a device, [N]."""
        return to_device(self.row, device)

    def of_rows(self, values: Tensor) -> Tensor:
        """Return the values of rows [A] at each position, [N] where these are."""
        return values[self.rows_on(values.device)]

    def is_at(self, column: Tensor) -> Tensor:
        """Return which of them are at the column of their row, [N] bool; columns [A] are there."""
        return self.on(column.device) % self.shape[1] == self.of_rows(column)

    def take(self, index: Tensor, number: Tensor) -> "Positions":
        """Return some of them by their indices, in order.

        Args:
            index: [n] on the CPU or on the device.
            number: [A] CPU, how many of each row they are.
        """
        row = torch.arange(len(number)).repeat_interleave(number)
        return Positions(self.on(index.device)[index], row, self.shape)


def in_groups(groups: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Return [N, V] logits of one run for each group, mostly of a single one.

    Args:
        groups: [N] group of each position.
        run: takes indices [n] of the positions of one group, and returns their logits [n, V].
    """
    members = [(groups == group).nonzero().squeeze(1) for group in torch.unique(groups)]
    logits = [run(indices) for indices in members]
    if len(logits) == 1:
        return logits[0]
    return torch.cat(logits)[to_device(torch.cat(members).argsort(), logits[0].device)]
