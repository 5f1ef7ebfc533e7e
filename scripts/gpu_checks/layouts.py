"""Stage that compares attention backends on all layouts with `eager`, forward and backward."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gpu_checks.checks import Check, Checks, difference, first_line
from textdiff.diffusion.corruption import count_documents
from textdiff.models import Layout, TextDiffusionConfig, TextDiffusionModel
from textdiff.models.attention import BACKENDS, unavailable

FORWARD = {"float32": 1e-4, "bfloat16": 3e-2}
BACKWARD = {"float32": 1e-4, "bfloat16": 6e-2}
PARTS = ("forward", "backward")
# The reference itself, and a kernel for half precision alone.
PAST = {("eager", "float32"), ("flash_attention_2", "float32")}
ROWS, LENGTH, BLOCK = 2, 256, 16
# Each is a compilation of seconds, forward and backward.
FLEX = {"block_diffusion", "block_diffusion, documents", "full, documents"}


def layouts(device: torch.device, folder: Path) -> Checks:
    """Compare all backends; FlexAttention on the layouts of training, as it trains."""

    def wanted(backend: str, name: str, dtype: str) -> bool:
        return backend != "flex_attention" or (name in FLEX and dtype == "bfloat16")

    yield from attention_checks(device, wanted)


class Network:
    """Two layers with random weights, and one batch, for every backend and layout.

    Args:
        device: where it runs.
    """

    def __init__(self, device: torch.device):
        torch.manual_seed(0)
        config = TextDiffusionConfig(
            vocab_size=97,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            adaln=True,
            qk_norm=True,
        )
        self.model = TextDiffusionModel(config).to(device)
        self.noisy, self.clean = torch.randint(0, 97, (2, ROWS, LENGTH), device=device)
        ends = torch.tensor([[70, 200, LENGTH], [130, 190, 230]], device=device)
        ids = (torch.arange(LENGTH, device=device)[:, None] >= ends[:, None, :]).sum(-1)
        self.documents = ids.masked_fill(ids == 3, -1)  # the second row ends in padding
        self.weights = torch.randn(ROWS, LENGTH, 97, device=device)

    def layouts(self) -> dict[str, Layout]:
        """Return all that training and likelihood use, with and without documents."""
        kinds = {
            "full": Layout(),
            "causal": Layout("causal"),
            "block_causal": Layout("block_causal", BLOCK),
            "block_diffusion": Layout("block_diffusion", BLOCK),
        }
        ids, count = self.documents, count_documents(self.documents.cpu())
        return kinds | {f"{k}, documents": v.within(ids, count) for k, v in kinds.items()}

    def run(self, backend: str, layout: Layout, dtype: str, gradients: bool) -> list[Tensor]:
        """Return logits outside padding and, where wanted, all gradients as one vector.

        Raises:
            ValueError: the backend does not offer this.
        """
        self.model.config._attn_implementation = backend
        self.model.zero_grad()
        context = self.clean if layout.streams == 2 else None
        real = self.documents >= 0
        if layout.document_ids is None:
            real = torch.ones_like(real)
        kind = self.noisy.device.type
        with (
            torch.set_grad_enabled(gradients),
            torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            logits = self.model(self.noisy, context, layout=layout).logits[real].float()
        if not gradients:
            return [logits]
        (logits * self.weights[real]).sum().backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [logits.detach(), torch.cat([grad.flatten().float() for grad in grads])]


def attention_checks(
    device: torch.device, wanted: Callable[[str, str, str], bool] = lambda *combination: True
) -> Checks:
    """Compare every backend and layout with eager in float32.

    Args:
        device: where they run.
        wanted: whether a backend is compared in a layout and a dtype.
    """
    network = Network(device)
    for backend in BACKENDS:
        if reason := unavailable(backend, device, gradients=True):
            yield Check(f"{backend}, backward", None, 0.0, reason, True)
    for name, layout in network.layouts().items():
        reference = network.run("eager", layout, "float32", gradients=True)
        for backend, dtype in itertools.product(BACKENDS, FORWARD):
            able = not unavailable(backend, device, gradients=False)
            if able and (backend, dtype) not in PAST and wanted(backend, name, dtype):
                yield from compared(network, backend, name, dtype, reference)


def compared(
    network: Network, backend: str, name: str, dtype: str, reference: list[Tensor]
) -> Checks:
    """Compare one backend and layout with [logits, gradients] of the reference."""
    trains = not unavailable(backend, network.noisy.device, gradients=True)
    limits = [FORWARD[dtype], BACKWARD[dtype]]
    try:
        values = network.run(backend, network.layouts()[name], dtype, trains)
    except Exception as error:
        absent = isinstance(error, ValueError)  # how a backend says that it has no such layout
        yield Check(f"{backend}, {name}, {dtype}", None, 0.0, first_line(error), absent)
        return
    for kind, one, other, limit in zip(PARTS, values, reference, limits, strict=False):
        yield Check(f"{backend}, {name}, {dtype}, {kind}", difference(one, other), limit)
