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
| `training` | figures: seconds of a step, tokens per second, share of the peak, memory |
| `sampling` | figures: tokens per second of 1, 16 and 64 rows |
| `kernels` | the kernels of a step that take the most time |

Each stage prints its lines at once, and the result so far is written after each. A stage that
fails does not end the others. One that would begin after the budget is left out. Exit code 0: all
that ran passed; 1: something did not, or torch sees no GPU. Not run on a GPU yet: limits allow for
rounding.
"""

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
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from textdiff import TextDiffusion
from textdiff.cli import main as textdiff
from textdiff.commands.flags import parse_verb
from textdiff.diffusion.corruption import count_documents
from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.noise import NoiseUniforms, draw_noise
from textdiff.diffusion.pairs import training_maker
from textdiff.diffusion.process import Vocabulary
from textdiff.loss import Batch, corrupt
from textdiff.models import Layout, TextDiffusionConfig, TextDiffusionModel, flash
from textdiff.models.attention import attend, prepare
from textdiff.models.chunked_sum import add_product
from textdiff.models.devices import compilation_counts, compile_blocks, uncompiled
from textdiff.train.learned_loss import training_loss

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "evals" / "results" / "check_gpu.json"
PEAK = 989e12  # products in bfloat16 per second, of an H100 or H200 by its data sheet


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
        levels_, position, token = (
            torch.rand(rows, n, dtype=torch.float64) for n in (blocks, length, length)
        )
        uniforms = NoiseUniforms(levels_, position, token if levels else None)
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
    width = 8192 if on_gpu else 256
    a, b = torch.randn(2, width, width, device=device).bfloat16()
    seconds = timed(lambda: a @ b, device)
    yield figure("bfloat16 product", 2 * width**3 / seconds / 1e12, "TFLOP/s")


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
        few, many = (
            warned(partial(model.generate, "", max_new_tokens=48, steps=n, rule=rule, seed=0))
            for n in (8, 16)
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
            if textdiff(["train", str(folder / "empty.yaml"), *words]) != 0:
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


def tokens(device: torch.device, folder: Path) -> Checks:
    """Texts of the model that comes with the package."""
    there, here = (
        TextDiffusion.from_pretrained("demo", device=where, dtype="float64")
        for where in (device.type, "cpu")
    )
    for options in ({}, {"rule": "confidence"}):
        texts = [
            model.generate("", num_samples=3, max_new_tokens=48, steps=16, seed=0, **options).texts
            for model in (there, here)
        ]
        changed = sum(one != other for one, other in zip(*texts, strict=True))
        yield Check(f"texts that differ, {options or 'ancestral'}", float(changed), 0.0)


def network(device: torch.device) -> tuple[dict, int, int]:
    """Sizes, rows and length of what is measured: the small published model, or a tiny one."""
    if device.type != "cuda":
        return SMALL | {"vocab_size": 1000}, 4, 64
    sizes = {"vocab_size": 50258, "hidden_size": 768, "num_hidden_layers": 12}
    return sizes | {"num_attention_heads": 12}, 32, 1024


def training(device: torch.device, folder: Path) -> Checks:
    """Seconds of a micro-batch under autocast, compiled, in blocks and not."""
    sizes, rows, length = network(device)
    for block, attention in ((None, "sdpa"), (16, "sdpa"), (16, "flex_attention")):
        if attention == "flex_attention" and device.type != "cuda":
            continue
        call, parameters = step_of(device, block, attention)
        seconds = timed(call, device)
        name = f"blocks of {block}, {attention}"
        yield figure(f"{name}: a step", 1e3 * seconds, "ms")
        yield figure(f"{name}: speed", rows * length / seconds, "tokens/s")
        streams = 1 if block is None else 2
        width = sizes["hidden_size"] * sizes["num_hidden_layers"]
        flops = rows * length * streams * (6 * parameters + 12 * width * length)
        if device.type == "cuda":
            yield figure(f"{name}: share of {PEAK:.3g} FLOP/s", flops / seconds / PEAK, "")
            memory = torch.cuda.max_memory_allocated(device)
            yield figure(f"{name}: memory", memory / 2**30, "GiB")
            torch.cuda.reset_peak_memory_stats(device)


def step_of(
    device: torch.device, block: int | None, attention: str
) -> tuple[Callable[[], object], int]:
    """Return a call that computes loss and gradients, and the number of parameters."""
    torch._dynamo.reset()
    sizes, rows, length = network(device)
    case = Case("mdlm", block, sizes, rows, length)
    model = case.model.to(device).train()
    model.config._attn_implementation = attention
    if device.type == "cuda":
        compile_blocks(model.blocks)
    loss, batch = training_loss(model, case.family(device)), case.batch.to(device)

    def call() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total, _ = loss(batch)
        total.backward()

    # The head runs at half the positions of one stream.
    head = sizes["vocab_size"] * sizes["hidden_size"] // (2 if block is None else 4)
    return call, sum(p.numel() for p in model.blocks.parameters()) + head


def sampling(device: torch.device, folder: Path) -> Checks:
    """Tokens per second of the model that comes with the package."""
    model = TextDiffusion.from_pretrained("demo", device=device.type)
    for rows in (1, 16, 64) if device.type == "cuda" else (1, 4):
        count = 128 if device.type == "cuda" else 32
        start = time.perf_counter()
        model.generate("", num_samples=rows, max_new_tokens=count, steps=32, seed=0)
        seconds = time.perf_counter() - start
        yield figure(f"{rows} rows", rows * count / seconds, "tokens/s")


def kernels(device: torch.device, folder: Path) -> Checks:
    """The fifteen kernels of a step that take the most time."""
    call, _ = step_of(device, 16, "flex_attention" if device.type == "cuda" else "sdpa")
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


def layouts(device: torch.device, folder: Path) -> Checks:
    """See `tests/manual/gpu_numbers.py`."""
    yield from numbers.attention_checks(device)


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
        device: cuda, or cpu.
        only: names of stages, with commas; empty: all.
        budget: seconds after which no stage begins.
        output: JSON file of the result; on a GPU the default is evals/results/check_gpu.json.
    """
    if device != "cpu" and not torch.cuda.is_available():
        message = "torch sees no GPU here; --device cpu runs a part"
        print(f"check_gpu: {message}", file=sys.stderr)
        return 1
    names = [stage.__name__ for stage in STAGES]
    if unknown := set(filter(None, only.split(","))) - set(names):
        message = f"no stage {', '.join(sorted(unknown))}; choose from {', '.join(names)}"
        print(f"check_gpu: --only: {message}", file=sys.stderr)
        return 1
    torch.set_float32_matmul_precision("highest")
    where, start, checks = torch.device(device), time.monotonic(), []
    output = output or (RESULT if where.type == "cuda" else None)
    for stage in STAGES:
        if only and stage.__name__ not in only.split(","):
            continue
        began = time.monotonic()
        for check in run_stage(stage, where, began - start <= budget):
            checks.append(check)
            print(line_of(check), flush=True)
        print(f"        {stage.__name__}: {time.monotonic() - began:.1f} s", flush=True)
        if output is not None:
            output.write_text(json.dumps(plain(numbers.record(checks, where)), indent=1) + "\n")
    failed = [check.name for check in checks if not check.passed]
    print(f"{len(checks)} lines, {len(failed)} failed" + "".join(f"\n  {n}" for n in failed))
    return 1 if failed else 0


def plain(value: object) -> object:
    """Return a record without infinite numbers, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(parse_verb(check_gpu, "check_gpu.py", sys.argv[1:])())
