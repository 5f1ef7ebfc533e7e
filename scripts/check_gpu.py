"""Check and measure training and generation on a GPU, stage by stage, within a budget of seconds.

    python scripts/check_gpu.py                                  # on a machine with a GPU
    python scripts/check_gpu.py --device cpu --output here.json  # what a CPU can do of it

| stage | reference, or figure |
|---|---|
| `ceilings` | figures: bandwidth of a copy, products in bfloat16 |
| `layouts` | backends and layouts against `eager` (`tests/manual/gpu_numbers.py`) |
| `documents` | FlashAttention to documents, by its package and by torch, against `eager` |
| `steps` | loss and gradients of a step of every objective, float32, against the CPU in float64 |
| `waits` | such a step, from a pinned batch, where to wait is an error; texts, by calls |
| `graphs` | compiled blocks: graphs, breaks, and none more after evaluation and generation |
| `resume` | 3 + 3 steps equal 6, bit for bit: `train.deterministic`, Muon, recomputed blocks |
| `tokens` | texts in float64 against the CPU's |
| `training` | figures: a step and its phases, MFU, memory over that of `textdiff plan` |
| `sampling` | figures: tokens per second of 1, 16 and 64 rows, and of a bound |
| `kernels` | the kernels of a step that take the most time |

Each line is printed at once, and the result so far is written with it. A stage that fails does not
end the others. One that would begin after the budget is left out. Exit code 0: all that ran passed;
1: something did not, or torch sees no GPU; 130: interrupted. Not run on a GPU yet: limits allow for
rounding.
"""

import gc
import importlib.util
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch
import torch._dynamo
from torch import Tensor

from textdiff import TextDiffusion
from textdiff.cli import main as textdiff
from textdiff.commands.flags import parse_verb
from textdiff.config import Config
from textdiff.diffusion.corruption import count_documents
from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.noise import NoiseUniforms, draw_noise
from textdiff.diffusion.pairs import training_maker
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import ConfigError
from textdiff.export.loading import find_device
from textdiff.loss import Batch, corrupt
from textdiff.models import Layout, TextDiffusionConfig, TextDiffusionModel, flash
from textdiff.models.attention import attend, prepare
from textdiff.models.chunked_sum import add_product
from textdiff.models.devices import compilation_counts, compile_blocks, uncompiled
from textdiff.planning.memory import peak_memory
from textdiff.planning.sizes import RunSizes, run_sizes
from textdiff.storage import whole_file
from textdiff.train.device_peaks import device_peak
from textdiff.train.learned_loss import training_loss
from textdiff.train.optim import build_optimizers
from textdiff.train.run_state import EMA

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "evals" / "results" / "check_gpu.json"


def _numbers() -> ModuleType:
    """Return the checks of numbers, which stand with the manual tests."""
    path = ROOT / "tests" / "manual" / "gpu_numbers.py"
    spec = importlib.util.spec_from_file_location("gpu_numbers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_numbers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


numbers = _numbers()
Check = numbers.Check
Checks = Iterator[numbers.Check]
OBJECTIVES = {
    "mdlm": {},
    "sedd": {"objective": {"kind": "sedd"}},
    "d3pm": {"objective": {"kind": "d3pm"}, "timesteps": 20},
    "sedd uniform": {"process": "uniform", "objective": {"kind": "sedd"}},
    "d3pm uniform": {"process": "uniform", "objective": {"kind": "d3pm"}, "timesteps": 20},
    "udlm": {"process": "uniform", "objective": {"kind": "udlm"}},
    "gidd": {
        "process": "hybrid",
        "schedule": {"kind": "hybrid"},
        "objective": {"kind": "gidd"},
    },
    "ar": {"objective": {"kind": "ar"}, "block_size": 1},
}
RUN = {
    "data.sources": '[{"source": "python-docs", "max_documents": 40}]',
    "data.sequence-length": "64",
    "data.num-workers": "0",
    "tokenizer": '{"kind": "byte"}',
    "model.hidden-size": "64",
    "model.num-layers": "2",
    "model.num-heads": "2",
    "model.gradient-checkpointing": "true",
    "train.global-batch-size": "8",
    "train.micro-batch-size": "4",
    "train.optimizer": "muon",
    "train.deterministic": "true",
    "train.log-every": "1",
    "train.checkpoint-every": "3",
    "evaluate.max-documents": "2",
    "sample.num-samples": "0",
}


def figure(name: str, value: float, unit: str) -> "numbers.Check":
    """A measurement, which cannot fail."""
    return Check(name, value, math.inf, unit)


class Case:
    """A network, its family and a batch.

    Args:
        name: of the objective.
        block_size: tokens per block; None: those of the objective.
        sizes: of the network.
        rows: of the batch.
        length: of its rows.
    """

    def __init__(self, name: str, block_size: int | None, sizes: dict, rows: int, length: int):
        common = {"process": "absorbing", "schedule": {"kind": "loglinear"}, "timesteps": None}
        objective = {"objective": {"kind": "mdlm"}, "block_size": block_size}
        self.spec = common | objective | OBJECTIVES[name]
        self.spec["block_size"] = OBJECTIVES[name].get("block_size", block_size)
        levels = self.spec["process"] != "absorbing"
        count = sizes["vocab_size"]
        torch.manual_seed(0)
        self.model = TextDiffusionModel(
            TextDiffusionConfig(
                **sizes,
                max_position_embeddings=length,
                mask_token_id=count - 1,
                adaln=levels,
                time_conditioning=levels,
                diffusion=self.spec,
            )
        )
        self.vocabulary = Vocabulary.of(count, count - 1)
        family = self.family(torch.device("cpu"))
        x0 = torch.randint(0, count - 1, (rows, length))
        blocks = family.blocks(length).count
        position, token = torch.rand(2, rows, length, dtype=torch.float64)
        strata = torch.randperm(rows * blocks).view(rows, blocks)  # so that half of all is masked
        drawn = (strata + 0.5).double() / strata.numel()
        uniforms = NoiseUniforms(drawn, position, token if levels else None)
        noise = draw_noise(family, x0, uniforms, training_maker(family, "count"))
        self.batch = corrupt(family, x0, noise, None)

    def family(self, device: torch.device) -> Family:
        """The family with its tables on a device."""
        return build_family(self.spec, self.vocabulary, device)

    def step(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The loss, and all gradients as one vector, on the CPU in float64."""
        model = self.model.to(device, dtype)
        model.zero_grad()
        loss, _ = training_loss(model, self.family(device))(self.batch.to(device))
        loss.backward()
        grads = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
        return [loss.detach().double().cpu(), torch.cat(grads)]


SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "qk_norm": True,
}


def ceilings(device: torch.device, folder: Path) -> Checks:
    """Measure the bandwidth of a copy and the speed of products."""
    on_gpu = device.type == "cuda"
    size = 2**28 if on_gpu else 2**22
    source = torch.empty(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device)
    yield figure("copy", 2 * source.nbytes / seconds / 1e9, "GB/s")
    yield figure(f"products in {product_dtype(device)}", product_speed(device) / 1e12, "TFLOP/s")


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a training step's products."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def product_speed(device: torch.device) -> float:
    """Operations per second of the product of two large matrices."""
    width = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, width, width, device=device).to(product_dtype(device))
    return 2 * width**3 / timed(lambda: a @ b, device)


def timed(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the least seconds of a call, after a first one."""
    call()
    best = math.inf
    for _ in range(repeats):
        finish(device)
        start = time.perf_counter()
        call()
        finish(device)
        best = min(best, time.perf_counter() - start)
    return best


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps(device: torch.device, folder: Path) -> Checks:
    """Every objective, in blocks and not, against float64 on the CPU."""
    for name in OBJECTIVES:
        for size in (None, 16) if name != "ar" else (None,):
            case = Case(name, size, SMALL, 4, 64)
            reference = case.step(torch.device("cpu"), torch.float64)
            found = case.step(device, torch.float32)
            for part, one, other in zip(("loss", "gradient"), found, reference, strict=True):
                yield Check(
                    f"{name}, blocks of {size}, {part}", numbers.difference(one, other), 1e-3
                )


def documents(device: torch.device, folder: Path) -> Checks:
    """FlashAttention within documents; and products of the head, added to a sum in place."""
    if device.type != "cuda":
        yield Check("documents", None, 0.0, "tests/devices does it by stand-ins on a CPU", True)
        return
    torch.manual_seed(0)
    ids = torch.tensor([[0] * 40 + [1] + [2] * 87, [-1] * 28 + [3] * 100])  # [2, 128]
    leaves = [torch.randn(2, heads, 128, 64).bfloat16() for heads in (4, 2, 2)]
    read = (ids >= 0)[:, None, :, None].double()
    for kind in ("full", "causal"):
        layout = Layout(kind).within(ids, count_documents(ids))
        wide = [x.double().requires_grad_() for x in leaves]
        expected = attend(prepare("eager", layout, torch.empty(2, 128)), *wide) * read
        expected.sum().backward()
        there = layout.within(ids.to(device), layout.documents)
        cut = flash.segments(there, 128)
        for package in {False, flash.installed()}:
            half = [x.to(device).requires_grad_() for x in leaves]
            segments = replace(cut, package=package)
            out = flash.flash_attention(*half, kind == "causal", segments) * read.to(device)
            out.sum().backward()
            pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(half, wide, strict=True))]
            worst = max(numbers.difference(a.double().cpu(), b.detach()) for a, b in pairs)
            yield Check(f"{kind}, {'flash_attn' if package else 'torch'}", worst, 0.02)
    one, other = (torch.randn(256, n, device=device).bfloat16() for n in (96, 64))
    total = torch.randn(96, 64, device=device)
    expected = total.double() + one.double().t() @ other.double()
    add_product(total, one.t(), other)
    yield Check("product added in place", numbers.difference(total, expected), 1e-4)


def waits(device: torch.device, folder: Path) -> Checks:
    """A step in which the CPU never waits."""
    if device.type != "cuda":
        yield Check("a step without waiting", None, 0.0, "tests/devices does it on a CPU", True)
        return
    for name in OBJECTIVES:
        case = Case(name, 16 if name != "ar" else None, SMALL, 4, 64)
        case.step(device, torch.float32)  # caches are filled once
        model, family = case.model, case.family(device)
        pinned: Batch = case.batch.pin_memory()
        finish(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = training_loss(model, family)(pinned.to(device))
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield Check(f"{name}: a step without waiting", 0.0, 0.0)
    model = TextDiffusion.from_pretrained("demo", device=device.type)
    for rule in ("ancestral", "confidence"):
        _, few, many = (  # what waits once waits in the first
            warned(partial(model.generate, "", max_new_tokens=48, steps=n, rule=rule, seed=0))
            for n in (8, 8, 16)
        )
        yield Check(f"{rule}: waits of 16 calls, less those of 8", float(many - few), 0.0)


def warned(call: Callable[[], object]) -> int:
    """Return how often torch warns that the CPU waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def graphs(device: torch.device, folder: Path) -> Checks:
    """Compiled blocks stay compiled, and whole."""
    backend = "inductor" if device.type == "cuda" else "eager"
    for attention in ("sdpa", "flex_attention") if device.type == "cuda" else ("sdpa",):
        torch._dynamo.reset()
        case = Case("mdlm", 16, SMALL, 4, 64)
        case.model.config._attn_implementation = attention
        with compiling(backend):
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
    torch._dynamo.reset()


@contextmanager
def compiling(backend: str) -> Iterator[None]:
    """Compile by a backend while entered; a CPU traces alone."""
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: compile_module(self, backend=backend)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.compile = compile_module  # type: ignore[method-assign]


def resume(device: torch.device, folder: Path) -> Checks:
    """An interrupted run is the uninterrupted one."""
    (folder / "empty.yaml").write_text("{}\n")
    lines = {}
    for name, pieces in {"whole": (6,), "parts": (3, 6)}.items():
        for count in pieces:
            flags = RUN | {
                "train.steps": str(count),
                "train.lr-schedule": "constant",
                "evaluate.every": "6",
                "run.dir": str(folder / name),
                "data.cache-dir": str(folder / "cache"),
            }
            words = [f"--{key}={value}" for key, value in flags.items()]
            code = textdiff(["train", str(folder / "empty.yaml"), *words])
            if code > 128:  # by a signal, after which it has saved
                raise KeyboardInterrupt
            if code != 0:
                yield Check("3 + 3 steps : 6", None, 0.0, "a run failed, see above")
                return
        text = (folder / name / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        lines[name] = {(row["step"], "loss" in row): row for row in rows}
    exact = ("loss", "grad_norm", "bound_nats")
    last = [(6, True), (6, False)]
    changed = sum(
        lines["whole"][at].get(key) != lines["parts"][at].get(key) for at in last for key in exact
    )
    yield Check("3 + 3 steps : 6, numbers that differ", float(changed), 0.0)
    weights = [folder / name / "export" / "model.safetensors" for name in lines]
    same = weights[0].read_bytes() == weights[1].read_bytes()
    yield Check("3 + 3 steps : 6, weights that differ", 0.0 if same else 1.0, 0.0)


TEXT = "Return a new list containing all items of the iterable in ascending order."


def tokens(device: torch.device, folder: Path) -> Checks:
    """Texts and bound of the model that comes with the package."""
    there, here = (
        TextDiffusion.from_pretrained("demo", device=where, dtype="float64")
        for where in (str(device), "cpu")
    )

    def written(model: TextDiffusion, **options: str) -> list[str]:
        request = {"num_samples": 3, "max_new_tokens": 48, "steps": 16, "seed": 0, **options}
        return model.generate("", **request).texts

    for rule in ("ancestral", "confidence"):
        texts = {cache: written(there, rule=rule, cache=cache) for cache in ("on", "off")}
        changed = differing(texts["on"], written(here, rule=rule, cache="on"))
        yield Check(f"texts that differ, {rule}", changed, 0.0)
        changed = differing(texts["on"], texts["off"])
        yield Check(f"texts that differ, {rule}, cached : uncached", changed, 0.0)
    values = [model.score([TEXT])[0].mean for model in (there, here)]
    yield Check("bound of a text", abs(values[0] / values[1] - 1.0), 1e-5)


def differing(texts: list[str], others: list[str]) -> float:
    """Return the number of texts that differ from others, pair by pair."""
    return float(sum(one != other for one, other in zip(texts, others, strict=True)))


def network(device: torch.device) -> tuple[dict, int, int]:
    """Sizes, rows and length of what is measured: the small published model, or a tiny one."""
    if device.type != "cuda":
        return SMALL | {"vocab_size": 1000}, 4, 64
    sizes = {"vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12}
    return sizes | {"num_attention_heads": 12}, 32, 1024


class Step:
    """A training step: forward with the loss, backward, clipping with optimizer and averages.

    Args:
        device: where it runs; compiled and in bfloat16 on a GPU.
        block: tokens per block; None: one.
        attention: its backend.
    """

    def __init__(self, device: torch.device, block: int | None, attention: str):
        torch._dynamo.reset()
        sizes, rows, length = network(device)
        case, on_gpu = Case("mdlm", block, sizes, rows, length), device.type == "cuda"
        self.device, self.on_gpu, self.tokens = device, on_gpu, rows * length
        self.run = planned(device, block, attention)
        self.model = case.model.to(device).train()
        self.model.config._attn_implementation = attention
        if on_gpu:
            compile_blocks(self.model.blocks)
        self.loss = training_loss(self.model, case.family(device))
        self.batch = case.batch.to(device)
        (self.optimizer,) = build_optimizers(self.model, self.run.config.train)
        self.averages = EMA(self.model, 0.999)

    def forward(self) -> None:
        """The loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            self.total, _ = self.loss(self.batch)

    def backward(self) -> None:
        """All gradients."""
        (self.total / self.tokens).backward()

    def update(self) -> None:
        """New weights and averages."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averages.update(self.model)

    def __call__(self) -> list:
        """Take the step; returns the moments before, between and after its phases."""
        moments = [moment(self.device)]
        for phase in (self.forward, self.backward, self.update):
            phase()
            moments.append(moment(self.device))
        return moments


def planned(device: torch.device, block: int | None, attention: str) -> RunSizes:
    """Sizes of the step as `textdiff plan` has them."""
    (sizes, rows, length), on_gpu = network(device), device.type == "cuda"
    model = {"hidden_size": sizes["hidden_size"], "num_layers": sizes["num_hidden_layers"]}
    model |= {"num_heads": sizes["num_attention_heads"], "qk_norm": sizes.get("qk_norm", False)}
    train = {"global_batch_size": rows, "micro_batch_size": rows, "compile": on_gpu}
    config = Config.model_validate(
        {
            "data": {"sequence_length": length},
            "model": model | {"attn_implementation": attention},
            "diffusion": {"block_size": block},
            "train": train,
        }
    )
    return run_sizes(config, sizes["vocab_size"], half=on_gpu, chunked=not on_gpu)


def moment(device: torch.device) -> "float | torch.cuda.Event":
    """This moment, of the CPU's clock or in the device's stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """The time between two moments."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def training(device: torch.device, folder: Path) -> Checks:
    """A training step in blocks and not: its time, its use of the device, its memory."""
    reached = product_speed(device)
    for block, attention in ((None, "sdpa"), (16, "sdpa"), (16, "flex_attention")):
        if attention == "sdpa" or device.type == "cuda":
            yield from measured(device, block, attention, reached)


def measured(device: torch.device, block: int | None, attention: str, reached: float) -> Checks:
    """Figures of one kind of step; products reach some operations per second."""
    gc.collect()  # what an earlier step has left would count as this one's
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step, name = Step(device, block, attention), f"blocks of {block}, {attention}"
    counted = sum(p.numel() for p in step.model.parameters())
    yield Check(f"{name}: parameters less those planned", counted - step.run.counts.total, 0.0)
    seconds = timed(step, device)
    moments = step()
    finish(device)
    yield figure(f"{name}: a step", 1e3 * seconds, "ms")
    for phase, ends in zip(("forward", "backward", "update"), pairwise(moments), strict=True):
        yield figure(f"{name}: {phase}", milliseconds(*ends), "ms")
    yield figure(f"{name}: speed", step.tokens / seconds, "tokens/s")
    used = step.tokens * step.run.flops.model / seconds
    yield figure(f"{name}: operations over those of products", used / reached, "")
    if (peak := device_peak(device, bf16=True)) is not None:
        yield figure(f"{name}: MFU", used / peak, f"of {peak / 1e12:.4g} TFLOP/s")
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
        yield figure(f"{name}: memory", memory / 1e9, "GB")
        yield figure(f"{name}: memory over plan", memory / peak_memory(step.run)["peak"], "")


def sampling(device: torch.device, folder: Path) -> Checks:
    """Tokens per second of the model that comes with the package."""
    model = TextDiffusion.from_pretrained("demo", device=device.type)
    for rows in (1, 16, 64) if device.type == "cuda" else (1, 4):
        count = 128 if device.type == "cuda" else 32
        start = time.perf_counter()
        model.generate("", num_samples=rows, max_new_tokens=count, steps=32, seed=0)
        seconds = time.perf_counter() - start
        yield figure(f"{rows} rows", rows * count / seconds, "tokens/s")
    texts = [f"{TEXT} {index}" for index in range(256 if device.type == "cuda" else 4)]
    model.score(texts[:1])
    start = time.perf_counter()
    bounds = model.score(texts)
    seconds = time.perf_counter() - start
    yield figure("bound", sum(bound.tokens for bound in bounds) / seconds, "tokens/s")


def kernels(device: torch.device, folder: Path) -> Checks:
    """The fifteen kernels of a step that take the most time."""
    call = Step(device, 16, "flex_attention" if device.type == "cuda" else "sdpa")
    call()
    finish(device)
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, *([activity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        finish(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    for event in events[:15]:
        yield figure(event.key[:60], getattr(event, key) / 1e3, f"ms in {event.count} calls")


# Each is a compilation of seconds, forward and backward.
FLEX = {"block_diffusion", "block_diffusion, documents", "full, documents"}


def layouts(device: torch.device, folder: Path) -> Checks:
    """See `tests/manual/gpu_numbers.py`; FlexAttention on the layouts of training, as it trains."""

    def wanted(backend: str, name: str, dtype: str) -> bool:
        return backend != "flex_attention" or (name in FLEX and dtype == "bfloat16")

    yield from numbers.attention_checks(device, wanted)


STAGES: list[Callable[[torch.device, Path], Checks]] = [
    ceilings, layouts, documents, steps, waits, graphs, resume, tokens, training, sampling, kernels,
]  # fmt: skip


def run_stage(
    stage: Callable[[torch.device, Path], Checks], device: torch.device, within_budget: bool
) -> Checks:
    """Yield a stage's checks; its failure is one of them."""
    if not within_budget:
        yield Check(stage.__name__, None, 0.0, "the budget was used up", True)
        return
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        try:
            for check in stage(device, Path(folder)):
                yield replace(check, name=f"{stage.__name__}: {check.name}")
        except Exception as error:
            yield Check(f"{stage.__name__}", None, 0.0, numbers.first_line(error))


def line_of(check: "numbers.Check") -> str:
    """One line of the output."""
    verdict = "skipped" if check.skipped else "ok" if check.passed else "FAILED"
    if math.isinf(check.limit):
        return f"        {check.name} = {check.found:.4g} {check.note}"
    found = "" if check.found is None else f" = {check.found:.2e}, at most {check.limit:g}"
    return f"{verdict:7} {check.name}{found} {check.note}".rstrip()


def check_gpu(
    device: str = "cuda", only: str = "", budget: float = 350.0, output: Path | None = None
) -> int:
    """Check and measure a device.

    Args:
        device: cuda, cuda:N or cpu.
        only: names of stages, with commas; empty: all.
        budget: seconds after which no stage begins.
        output: JSON file of the result; on a GPU the default is evals/results/check_gpu.json.
    """
    try:
        where, stages = _device(device), _stages(only)
    except ConfigError as error:
        print(f"check_gpu: {error}", file=sys.stderr)
        return 1
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.recompile_limit = 256
    output = output or (RESULT if where.type == "cuda" else None)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    start, checks, code = time.monotonic(), [], 0

    def take(check: "numbers.Check") -> None:
        checks.append(check)
        print(line_of(check), flush=True)
        if output is not None:
            with whole_file(output) as scratch:
                scratch.write_text(
                    json.dumps(plain(numbers.record(checks, where)), indent=1) + "\n"
                )

    try:
        for stage in stages:
            began = time.monotonic()
            for check in run_stage(stage, where, began - start <= budget):
                take(check)
            print(f"        {stage.__name__}: {time.monotonic() - began:.1f} s", flush=True)
    except KeyboardInterrupt:
        take(Check("interrupted", None, 0.0, "the stages after this line did not run"))
        code = 130
    failed = [check.name for check in checks if not check.passed]
    print(f"{len(checks)} lines, {len(failed)} failed" + "".join(f"\n  {n}" for n in failed))
    return code or (1 if failed else 0)


def _device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: it is not here, or nothing is checked on its kind.
    """
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: choose cuda, cuda:N or cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here; --device cpu runs a part")
    return find_device(name)


def _stages(only: str) -> list[Callable[[torch.device, Path], Checks]]:
    """The stages of those names, in their order.

    Raises:
        ConfigError: an unknown stage.
    """
    wanted, names = {name for name in only.split(",") if name}, [s.__name__ for s in STAGES]
    if unknown := wanted - set(names):
        listed = ", ".join(sorted(unknown))
        raise ConfigError(f"--only: no stage {listed}; choose from {', '.join(names)}")
    return [stage for stage in STAGES if not wanted or stage.__name__ in wanted]


def plain(value: object) -> object:
    """Return a record without infinite numbers, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(parse_verb(check_gpu, "check_gpu.py", sys.argv[1:])())
