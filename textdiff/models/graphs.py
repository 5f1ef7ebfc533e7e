"""Network calls that a GPU repeats by itself: recorded once per shape, launched as one.

A call on a few rows keeps a GPU busy for less time than its hundreds of kernels take to launch. So
they are recorded (a CUDA graph), and later calls of the same rows and width replay them. A recorded
kernel reads the same memory each time: what differs from call to call is copied there before.

What depends on the number N of positions stays outside: the network runs at every position of the
call, and the head at those that are wanted. Letters: B rows, L tokens of one call, N positions, W
places of a cache that are read, H hidden.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import CacheSlice
from .interface import Denoiser
from .layers import Previous
from .layout import Layout

_log = logging.getLogger(__name__)

MOST_TOKENS = 4096
"""Tokens of the largest recorded calls. Larger ones take longer than their launches."""

MOST_GRAPHS = 64
"""Recorded calls that are kept; then all are dropped. Each has inputs of its own.

All else is in memory that they share: a replay writes over the outputs of any other.
"""


def replays(device: torch.device) -> bool:
    """Return whether a device can repeat recorded kernels."""
    return device.type == "cuda" and torch.cuda.is_available()


class CallInputs(NamedTuple):
    """Everything that differs between calls of one shape, on the device.

    Attributes:
        tokens: [B, L].
        sigma: [B, S] noise levels.
        documents: [B, L] ids; None: rows are whole documents.
        finished: [B] tokens that are finished, where the layout asks; else None.
        positions: [B, L] positions of the tokens in their rows, with a cache; else None.
        place: [B, L] places of the cache that are written.
        slots: [B] slots of the rows; None: the first B.
        mask: [B or 1, 1, L or 1, W] bool, places that are seen.
        expected: [B * L, H] earlier predictions, of a network that reads them; None: none yet.
        known: [B * L] bool, where there are any.
    """

    tokens: Tensor
    sigma: Tensor
    documents: Tensor | None
    finished: Tensor | None
    positions: Tensor | None
    place: Tensor | None
    slots: Tensor | None
    mask: Tensor | None
    expected: Tensor | None
    known: Tensor | None

    @staticmethod
    def of(
        tokens: Tensor,
        sigma: Tensor,
        layout: Layout,
        cache: CacheSlice | None,
        previous: Previous | None,
    ) -> "CallInputs":
        """Return those of a call, whose cached places are `fixed`."""
        expected = known = None
        if previous is not None:
            size = tokens.numel()
            expected = previous.expected.new_zeros(size, previous.expected.shape[1])
            expected = expected.index_copy(0, previous.at, previous.expected)
            read = torch.ones_like(previous.at, dtype=torch.bool)
            read = read if previous.known is None else previous.known
            known = read.new_zeros(size).index_copy(0, previous.at, read)
        if cache is None:
            seen = layout.document_ids, layout.finished, None, None, None, None
        else:  # its mask is what the layout says
            assert isinstance(cache.place, Tensor)
            seen = None, None, cache.positions, cache.place, cache.slots, cache.mask
        return CallInputs(tokens, sigma, *seen, expected, known)

    def layout(self, kind: Layout) -> Layout:
        """Return a layout of these inputs."""
        return replace(kind, document_ids=self.documents, finished=self.finished)

    def cached(self, store: Tensor) -> CacheSlice | None:
        """Return the places of a store of keys and values."""
        if self.place is None:
            return None
        assert self.positions is not None
        assert self.mask is not None
        width = self.mask.shape[-1]
        return CacheSlice(store, self.positions, self.place, self.slots, width, None, self.mask)

    def previous(self) -> Previous | None:
        """Return the earlier predictions."""
        if self.expected is None:
            return None
        at = torch.arange(len(self.expected), device=self.expected.device)
        return Previous(at, self.expected, self.known)

    @property
    def shape(self) -> tuple[torch.Size | None, ...]:
        """Shapes: calls of one recording agree in them."""
        return tuple(None if x is None else x.shape for x in self)


Hidden = tuple[Tensor, Tensor | None]
"""Hidden states [B, L, H] of a call, and conditions of the head, or None."""

Run = Callable[[CallInputs], Hidden]

REFUSED = (
    "the GPU could not record a call of the network ({}); texts stay as they are, but each kernel "
    "is launched by itself from now on: please report it"
)


class RecordedCalls:
    """A network whose calls are recorded when a shape comes for the second time.

    The first call of a shape runs as always: libraries set themselves up in it.

    Args:
        model: the network, whose weights stay where they are.
    """

    def __init__(self, model: Denoiser):
        self.model = model
        self.works = True
        self._device = model.device
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()
        self._calls: dict[tuple[torch.Size | None, ...], _Recording | None] = {}

    def serves(self, tokens: int) -> bool:
        """Return whether calls on so many tokens are recorded: small ones without gradients."""
        return self.works and tokens <= MOST_TOKENS and not torch.is_grad_enabled()

    def __call__(
        self,
        tokens: Tensor,
        sigma: Tensor,
        at: Tensor,
        layout: Layout,
        cache: CacheSlice | None = None,
        previous: Previous | None = None,
    ) -> Tensor:
        """Return [N, V] logits; arguments as for `Denoiser.hidden`, tensors on the device."""
        cache = None if cache is None else cache.fixed(len(tokens))
        inputs = CallInputs.of(tokens, sigma, layout, cache, previous)

        def run(inputs: CallInputs) -> Hidden:
            return self.model.hidden(
                inputs.tokens,
                sigma=inputs.sigma,
                layout=inputs.layout(layout),
                cache=None if cache is None else inputs.cached(cache.store),
                **({} if previous is None else {"previous": inputs.previous()}),
            )

        x, condition = self._outputs(inputs, run)
        condition = None if condition is None else condition.flatten(0, 1)[at]
        logits: Tensor = self.model.output_layer(x.flatten(0, 1)[at], condition)
        return logits

    def _outputs(self, inputs: CallInputs, run: Run) -> Hidden:
        """Return the outputs of a call, which the next call, of any shape, may overwrite."""
        known, shape = self._calls, inputs.shape
        if shape not in known:
            known[shape] = None
            return run(inputs)
        recording = known[shape]
        if recording is None:
            try:
                recording = known[shape] = self._record(inputs, run)
            except RuntimeError as error:
                _log.warning("%s", REFUSED.format(str(error).partition("\n")[0]))
                self.works = False
                return run(inputs)
        return recording(inputs)

    def _record(self, inputs: CallInputs, run: Run) -> "_Recording":
        if sum(call is not None for call in self._calls.values()) >= MOST_GRAPHS:
            # All together: with one graph, torch drops work space that others of its stream use.
            torch.cuda.synchronize(self._device)
            self._calls.clear()
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(torch.cuda.current_stream(self._device)):  # also after an error
            return _Recording(inputs, run, self._stream, self._pool)


class _Recording:
    """A recorded call: memory for its inputs, kernels that read it, and their outputs."""

    def __init__(self, inputs: CallInputs, run: Run, stream: torch.cuda.Stream, pool: object):
        self.inputs = [None if x is None else x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # Another thread may use the GPU meanwhile.
        with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
            self.outputs = run(CallInputs(*self.inputs))
        _log.debug("recorded a call on %d rows of %d tokens", *inputs.tokens.shape)

    def __call__(self, inputs: CallInputs) -> Hidden:
        for held, x in zip(self.inputs, inputs, strict=True):
            if held is not None:
                held.copy_(x)
        self.graph.replay()
        return self.outputs
