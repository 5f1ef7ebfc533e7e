"""Stage that counts the graphs of compiled blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gpu_checks.cases import SMALL, Case
from gpu_checks.checks import Check, Checks, contained
from gpu_checks.device import clear
from textdiff.models.devices import compilation_counts, compile_blocks, uncompiled


def graphs(device: torch.device, folder: Path) -> Checks:
    """Count graphs by attention backend: compiled blocks stay compiled, and whole."""
    for attention in ("sdpa", "flex_attention") if device.type == "cuda" else ("sdpa",):
        clear(device)
        yield from contained(attention, graph_checks(device, attention))


def graph_checks(device: torch.device, attention: str) -> Checks:
    """Count graphs of ten steps, with an evaluation between them."""
    case = Case("mdlm", 16, SMALL, 4, 64)
    case.model.config._attn_implementation = attention
    with compiling("inductor" if device.type == "cuda" else "eager"):
        compile_blocks(case.model.blocks)
    before = compilation_counts()
    for index in range(10):
        case.step(device, torch.float32)
        if index == 1:
            first = compilation_counts()
        if index == 5:
            with uncompiled(True), torch.no_grad():
                case.model.eval()(torch.zeros(2, 48, dtype=torch.int64, device=device))
            case.model.train()
    after = compilation_counts()
    made = after["graphs"] - before["graphs"]
    yield Check(f"{attention}: graphs", float(made), 2.0)
    yield Check(f"{attention}: breaks", float(after["breaks"] - before["breaks"]), 0.0)
    yield Check(f"{attention}: graphs later", float(after["graphs"] - first["graphs"]), 0.0)


@contextmanager
def compiling(backend: str) -> Iterator[None]:
    """Compile by a backend while entered; a CPU traces alone."""
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: compile_module(self, backend=backend)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.compile = compile_module  # type: ignore[method-assign]
