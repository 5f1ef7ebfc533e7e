"""Sum of a loss over chunks of positions, each with its gradients, so that no logits are kept.

Autograd makes the gradient [V, H] of a head's weight anew for every chunk, and then adds it to the
others. On a GPU the product is added to the sum instead, which is read and written once.

Shapes: N positions, n of a chunk, V vocabulary, H hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class HeadChunks(Protocol):
    """Positions whose loss is summed, some at a time.

    Attributes:
        inputs: of the head, [N, ...] each.
        head: maps them to logits [N, V].
        on_cpu: whether they are on the CPU.
    """

    inputs: list[Tensor]
    head: nn.Module
    on_cpu: bool

    def chunks(self) -> list[slice]:
        """Return slices of positions whose logits are alive together."""

    def summed_chunks(self) -> list[tuple[slice, int]]:
        """Return the slices, and how many of their first positions an earlier one has had."""

    def losses(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return [n] training losses and [n] nats of one chunk."""


def chunked_sum(terms: HeadChunks, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed training loss, and [N] nats without gradient.

    Args:
        terms: the positions and their objective.
        parameters: of the head, and others that the objective reads.
    """
    return _ChunkedSum.apply(terms, len(terms.inputs), *terms.inputs, *parameters)


class _ChunkedSum(torch.autograd.Function):
    """Sums the training loss over chunks of positions, taking each chunk's gradient at once.

    Its inputs are those of the head, then the parameters of head and schedule. It returns the
    training loss, summed, and [N] terms of the negative ELBO without gradient.
    """

    @staticmethod
    def forward(ctx: Any, terms: HeadChunks, count: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        inputs, parameters = tensors[:count], tensors[count:]
        if not terms.on_cpu:
            return _ChunkedSum._in_place(ctx, terms, inputs, parameters)
        total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
        nelbos = total.new_zeros(len(inputs[0]))
        input_grads = [torch.empty_like(x) for x in inputs]
        parameter_grads = [torch.zeros_like(p) for p in parameters]
        for chunk in terms.chunks():
            with torch.enable_grad():
                leaves = [x[chunk].detach().requires_grad_() for x in inputs]
                losses, nelbo = terms.losses(chunk, terms.head(*leaves))
                loss = losses.sum()
                grads = torch.autograd.grad(loss, [*leaves, *parameters])
            total += loss.detach()
            nelbos[chunk] = nelbo.detach()
            for whole, grad in zip(input_grads, grads, strict=False):
                whole[chunk] = grad
            if parameters:  # none where adapters are trained, and the head is frozen
                torch._foreach_add_(parameter_grads, list(grads[count:]))
            del grads, losses, nelbo, loss  # before the next chunk allocates its own
        ctx.save_for_backward(*input_grads, *parameter_grads)
        ctx.mark_non_differentiable(nelbos)
        return total, nelbos

    @staticmethod
    def _in_place(
        ctx: Any, terms: HeadChunks, inputs: Sequence[Tensor], parameters: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        """Run the forward pass where products of the head can be added to sums of gradients.

        On a CPU another order of adding would round otherwise, and save little.
        """
        total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
        nelbos = total.new_zeros(len(inputs[0]))
        input_grads = [torch.empty_like(x) for x in inputs]
        gradients = SummedGradients(parameters)
        for chunk, before in terms.summed_chunks():
            with torch.enable_grad():
                leaves = [x[chunk].detach().requires_grad_() for x in inputs]
                with gradients:
                    logits = terms.head(*leaves)
                losses, nelbo = terms.losses(chunk, logits)
                del logits  # the graph holds what it needs
                loss = (losses[before:] if before else losses).sum()
                others = [i for i in range(len(parameters)) if i not in gradients.added]
                grads = torch.autograd.grad(loss, [*leaves, *(parameters[i] for i in others)])
            total += loss.detach()
            new = slice(chunk.start + before, chunk.stop)
            nelbos[new] = nelbo.detach()[before:]
            for whole, grad in zip(input_grads, grads, strict=False):
                whole[new] = grad[before:]
            for i, grad in zip(others, grads[len(inputs) :], strict=True):
                gradients.sums[i].add_(grad)
            del grads, losses, nelbo, loss  # before the next chunk allocates its own
        sums = [x.to(p.dtype) for x, p in zip(gradients.sums, parameters, strict=True)]
        ctx.save_for_backward(*input_grads, *sums)
        ctx.mark_non_differentiable(nelbos)
        return total, nelbos

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad.mul_(grad_loss) for grad in ctx.saved_tensors)


class SummedGradients(TorchFunctionMode):
    """Mode in which linear maps add the gradients of their parameters to sums.

    Args:
        parameters: those whose gradients are wanted.

    Attributes:
        sums: their gradients, float32 where they are narrower.
        added: indices of the parameters whose sums linear maps have added to.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        super().__init__()
        wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        self.sums = [torch.zeros_like(p, dtype=w) for p, w in zip(parameters, wide, strict=True)]
        self.index = {id(p): i for i, p in enumerate(parameters)}
        self.added: set[int] = set()
        self._cast: dict[tuple[int, torch.dtype], Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or our linear map."""
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and id(args[1]) in self.index:
            return self._linear(*args)
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b in autocast's dtype, or in that of x."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        cast, sums = [], []
        for p in (weight, bias):
            cast.append(None if p is None else self._as(p, dtype))
            place = None if p is None else self.index.get(id(p))
            sums.append(None if place is None else self.sums[place])
            self.added |= set() if place is None else {place}
        return _SummedLinear.apply(x.to(dtype), *cast, *sums)

    def _as(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a parameter in a dtype, cast once for all chunks."""
        key = id(parameter), dtype
        if key not in self._cast:
            self._cast[key] = parameter.detach().to(dtype)
        return self._cast[key]


class _SummedLinear(torch.autograd.Function):
    """The map x W^T + b, whose backward pass adds the gradients of W and b to two sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *sums: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums = sums
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, columns = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        of_weight, of_bias = ctx.sums
        add_product(of_weight, rows.t(), columns)
        if of_bias is not None:
            of_bias.add_(rows.sum(0))
        return grad @ weight, None, None, None, None


def add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add the product of two matrices to a third one, in place.

    CUDA multiplies narrow matrices into a float32 sum; other devices make the product first.
    """
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    elif total.device.type == "cuda":
        torch.addmm(total, one, other, out_dtype=total.dtype, out=total)
    else:
        total.add_(one @ other)
