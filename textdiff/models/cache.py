"""Keys and values of finished tokens, so that generating a block runs the network on it alone.

One tensor for the whole generation, [layers, 2, slots, heads, capacity, D], keys after rotation.
A slot is one row of text; slots hold different numbers of tokens. Every call writes the keys and
values of all its tokens at their places and reads back what may be seen. Those of noisy tokens are
written over until their block is finished, so that nothing has to be kept apart.

It is exact where finished tokens depend on nothing later: in causal and block causal layouts, as
long as the noise level of finished blocks is zero. In the full layout it is not exact, and there is
only an `approximate_slice`. With a window the cache is a ring, and a token may have read others
that have been dropped since: its logits then differ from those of a network run on the window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .devices import on_device, to_device
from .layout import Layout

LEAST_READ = 64
"""Places that a call of a fixed shape reads, at least."""


class KVCache:
    """Store for the keys and values of some rows.

    Args:
        shape: (layers, 2, slots, heads, capacity, D).
        dtype: of keys and values, that of the network's computation.
        device: of the network.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        # Zeros: masked values are multiplied by a probability of 0, which NaN would survive.
        self.store = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        """Tokens per slot."""
        return self.store.shape[4]

    def copy(self, source: int, targets: list[int]) -> None:
        """Copy slot `source` to slots `targets`."""
        at = on_device(self.store, targets)
        one = self.store[:, :, source].unsqueeze(2)
        self.store.index_copy_(2, at, one.expand(-1, -1, len(targets), -1, -1, -1))

    def exact_slice(
        self, layout: Layout, starts: Tensor, length: int, slots: Tensor | None, window: int | None
    ) -> "CacheSlice":
        """Return the places that one call on some slots writes and reads.

        Args:
            layout: causal or block causal, over all tokens of a row. Where its context is causal,
                `finished` [R] counts those of each row, on the CPU.
            starts: [R] position of the first token of each row, on the CPU.
            length: T tokens of each row in this call.
            slots: [R] slots of the rows, on the CPU; None: the first R.
            window: tokens before a block that it sees; None: all.

        Raises:
            ValueError: a layout whose finished tokens depend on later ones.
        """
        if layout.kind not in ("causal", "block_causal"):
            raise ValueError(
                f"a cache needs a causal or block_causal layout: under {layout.kind} finished "
                "tokens depend on later ones (approximate_slice keeps them all the same)"
            )
        device = self.store.device
        end = int(starts.max()) + length
        width = min(end, self.capacity)
        at = starts[:, None] + torch.arange(length)  # [R, T]
        same = bool((starts == starts[0]).all())
        size = _block_size(layout)
        # Tokens of one block see the same, unless they are finished and their context is causal.
        noisy = layout.finished is not None and bool((layout.finished <= starts).all())
        alike = noisy or not layout.causal_context
        if same and end <= self.capacity and window is None:
            place: Tensor | slice = slice(int(starts[0]), end)
            held = torch.arange(width)[None]
            mask = None if length == size and alike else _visible(held, at[:1], layout, None)
        else:
            place = to_device(at % self.capacity, device)
            held = _held(starts + length, self.capacity, width)
            mask = _visible(held, at, layout, window)
        return CacheSlice(
            self.store,
            at[0] if same else at,
            place,
            None if slots is None else to_device(slots, device),
            width,
            held,
            None if mask is None else to_device(mask, device),
        )

    def approximate_slice(self, at: Tensor, lengths: Tensor, slots: Tensor | None) -> "CacheSlice":
        """Return the places of one call of the full layout, the other tokens being as stored.

        It is an approximation: their keys and values would depend on the tokens of this call.

        Args:
            at: [R, T] positions of the tokens, on the CPU. Padding of shorter rows may be at any
                place that no row uses, such as the last one of a cache with one to spare.
            lengths: [R] tokens of each row, all of which are seen, on the CPU.
            slots: [R] slots of the rows, on the CPU; None: the first R.
        """
        device = self.store.device
        width, first = int(lengths.max()), int(at[0, 0])
        together = bool((at == first + torch.arange(at.shape[1])).all())
        seen = (torch.arange(width) < lengths[:, None])[:, None, None]  # [R, 1, 1, width]
        return CacheSlice(
            self.store,
            at[0] if together else at,
            slice(first, first + at.shape[1]) if together else to_device(at, device),
            None if slots is None else to_device(slots, device),
            width,
            torch.arange(width)[None],
            None if bool(seen.all()) else to_device(seen, device),
        )


def _held(ends: Tensor, capacity: int, width: int) -> Tensor:
    """Return [R, width] positions whose keys the places of a ring hold; negative where none are.

    Args:
        ends: [R] position after the last that was written.
        capacity: places of the ring.
        width: number of places that are read.
    """
    last = ends[:, None] - 1
    return last - (last - torch.arange(width)) % capacity


def _block_size(layout: Layout) -> int:
    return layout.block_size if layout.kind == "block_causal" else 1


def _visible(held: Tensor, at: Tensor, layout: Layout, window: int | None) -> Tensor:
    """Return [R, 1, T, width] bool: tokens see their block and earlier ones, within the window.

    Args:
        held: [R, width] positions of the places.
        at: [R, T] positions of the tokens.
        layout: causal or block causal.
        window: tokens before a block that it sees; None: all.
    """
    size = _block_size(layout)
    block = at // size
    held = held[:, None, :]
    finished = None if layout.finished is None else layout.finished[: len(at), None, None]
    length = int(at.max()) + 1
    seen = (held >= 0) & layout.allows(at[:, :, None], held, length, finished)
    if window is not None:
        seen &= held >= (block * size - window)[:, :, None]
    return seen.unsqueeze(1)


@dataclass(frozen=True)
class CacheSlice:
    """Places of a cache that one call writes and reads.

    Attributes:
        store: all keys and values.
        positions: [T] or [R, T] positions of the tokens.
        place: the places that are written: a slice, or [R, T].
        slots: [R] slots of the rows; None: the first R.
        width: places that are read.
        held: [R or 1, width] positions whose keys these places hold, on the CPU.
        mask: [R or 1, 1, T or 1, width] bool; None: all of them are seen.
    """

    store: Tensor
    positions: Tensor
    place: Tensor | slice
    slots: Tensor | None
    width: int
    held: Tensor
    mask: Tensor | None

    def fixed(self, rows: int) -> "CacheSlice":
        """Return the same places as tensors on the device, of shapes that many calls share.

        More places are read, up to a power of two, behind a mask.

        Args:
            rows: R.
        """
        device, place = self.store.device, self.place
        if isinstance(place, slice):
            place = torch.arange(place.start, place.stop)
        width = min(self.store.shape[4], max(LEAST_READ, 1 << (self.width - 1).bit_length()))
        more = 0, width - self.width
        held = functional.pad(self.held, more, value=-1)
        if self.mask is None:
            seen = to_device(held >= 0, device)[:, None, None]  # one row: they see the same
        else:
            seen = functional.pad(self.mask, more)
        return CacheSlice(
            self.store,
            to_device(self.positions.expand(rows, -1), device),
            to_device(place.expand(rows, -1), device),
            self.slots,
            width,
            held,
            seen,
        )

    def exchange(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [R, heads, T, D] of a layer, and read [R, heads, width, D]."""
        store = self.store[layer]
        rows = len(k)
        if isinstance(self.place, slice) and self.slots is None:
            store[0, :rows, :, self.place] = k
            store[1, :rows, :, self.place] = v
        else:
            slots = torch.arange(rows, device=k.device) if self.slots is None else self.slots
            place = self.place
            if isinstance(place, slice):
                place = torch.arange(place.start, place.stop, device=k.device).expand(rows, -1)
            # Indices apart from each other put their dimensions first: [R, T, 2, heads, D].
            both = torch.stack([k, v]).permute(1, 3, 0, 2, 4)
            store[:, slots[:, None], :, place] = both
        seen = store[..., : self.width, :]
        k, v = seen[:, :rows] if self.slots is None else seen[:, self.slots]
        return k, v
