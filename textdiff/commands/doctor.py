"""`textdiff doctor`: what this machine can run, in a form to paste into bug reports.

A probe that fails is a line of the report. No secrets are shown: no tokens, no values of the
environment but the variables named here, and `~` for the home directory.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from textdiff.commands.arguments import JsonFlag
from textdiff.commands.parallel import idle_threads
from textdiff.errors import first_line
from textdiff.section import torch
from textdiff.view.progress import make_console, print_json, quiet_libraries

LIBRARIES = (
    "torch transformers accelerate datasets tokenizers safetensors numpy pydantic rich tensorboard"
)
EXTRAS = {"flash": "flash_attn", "eval": "lm_eval mauve matplotlib", "dev": "pytest ruff mypy"}
CPU_FLAGS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
ROOM_GB = 1.0  # less than this is reported as little
HUB_SECONDS = 2.0


@dataclass(frozen=True)
class Finding:
    """Line of the report: `ok`, `no` (not here, nor needed), `warning`, `broken` (no training)."""

    section: str
    name: str
    value: str
    state: str = "ok"
    advice: str = ""


def doctor(*, json: JsonFlag = False) -> int:
    """Report versions, devices, precisions, attention backends, caches and extras.

    Exits with 0 when training can run here, with 1 when something essential is broken.

    Args:
        json: print one JSON object instead.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe's result is the report
        findings = list(examine())
    able = all(finding.state != "broken" for finding in findings)
    if json:
        print_json({"ok": able, "findings": [asdict(finding) for finding in findings]})
    else:
        _print_lines(findings, able)
    return 0 if able else 1


def examine() -> Iterator[Finding]:
    """Run all probes, one after the other; a failure is a finding."""
    for probe, essential in PROBES:
        section = probe.__name__.removeprefix("probe_")
        try:
            for entry in probe():
                yield Finding(section, *entry)
        except Exception as error:
            state = ("broken", "reinstall textdiff and its dependencies")
            words = f"failed: {_reason(error)}"
            yield Finding(section, "probe", words, *(state if essential else ("warning",)))


Entries = Iterator[tuple[str, ...]]  # fields of findings but the section, the probe's name


def probe_versions() -> Entries:
    """Probe textdiff, Python, the libraries and git."""
    from textdiff import __version__
    from textdiff.export.records import PACKAGE, commit_of

    commit = commit_of(PACKAGE.parent)
    yield "textdiff", __version__ + (f" ({commit[:12]})" if commit else "")
    yield "python", platform.python_version()
    for name in LIBRARIES.split():
        reason = _failure(partial(importlib.import_module, name))
        if reason is None:
            yield name, importlib.metadata.version(name)
        else:
            repair = "--force-reinstall " if importlib.util.find_spec(name) else ""
            yield name, f"cannot be imported: {reason}", "broken", f"pip install {repair}{name}"
    yield "git", _home(shutil.which("git") or "not found")


def probe_machine() -> Entries:
    """Probe platform, processor and memory."""
    import psutil  # type: ignore[import-untyped]

    able = torch.cpu.get_capabilities()
    yield "platform", platform.platform()
    name = str(able.get("cpu_name") or platform.machine())
    yield "processor", " ".join([name, *(flag for flag in CPU_FLAGS if able.get(flag))])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{cores} usable, torch uses {torch.get_num_threads()}"
    yield "idle threads", idle_threads()
    yield "memory", f"{psutil.virtual_memory().total / 1e9:.1f} GB"


def probe_devices() -> Entries:
    """Probe accelerators, and which precision the default device computes natively."""
    from textdiff.export.loading import default_device
    from textdiff.train.optim import native_bf16

    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        size = f"{card.total_memory / 1e9:.1f} GB"
        yield f"cuda:{index}", f"{card.name}, {size}, capability {card.major}.{card.minor}"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    yield "default", default_device()
    able = native_bf16(torch.device(default_device()))
    emulated = "emulated; mixed_precision: auto takes fp32"
    yield "bfloat16", "native" if able else emulated, *_no(able)


def probe_attention() -> Entries:
    """Try each backend on a tiny network: forward, and backward where it has one."""
    quiet_libraries()
    from textdiff.export.loading import default_device
    from textdiff.models.attention import BACKENDS, unavailable

    device = torch.device(default_device())
    for backend in BACKENDS:
        training, inference = (
            unavailable(backend, device, gradients)
            or _failure(partial(_attend, backend, device, gradients))
            for gradients in (True, False)
        )
        if training is None and inference is None:
            yield backend, f"trains and infers on {device.type}"
            continue
        words = f"infers only: {training}" if inference is None else training or ""
        yield backend, words, *(("broken", "reinstall torch") if backend == "sdpa" else ("no",))


def _attend(backend: str, device: "torch.device", gradients: bool) -> None:
    """Run a tiny network on a backend."""
    from textdiff.models import TextDiffusionConfig, TextDiffusionModel

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = TextDiffusionConfig(vocab_size=8, **size)
    config._attn_implementation = backend
    model = TextDiffusionModel(config).to(device)
    if backend == "flash_attention_2":  # it does not compute float32
        model = model.to(torch.bfloat16)
    ids = torch.zeros(1, 16, dtype=torch.int64, device=device)  # [B, L]
    with torch.set_grad_enabled(gradients):
        total = model(ids).logits.sum()
    if gradients:
        total.backward()


def probe_compile() -> Entries:
    """Probe the compiler that torch.compile generates code with."""
    on_cuda = torch.cuda.device_count() > 0
    tried = ["triton"] if on_cuda else [os.environ.get("CXX"), "g++", "clang++", "cl"]
    find = importlib.util.find_spec if on_cuda else shutil.which
    compiler = next((Path(name).name for name in tried if name and find(name)), None)
    lacking = "triton is not installed" if on_cuda else "no C++ compiler (g++ or clang++) found"
    yield "torch.compile", compiler or lacking, *_no(compiler)


def probe_distributed() -> Entries:
    """Probe the backends of several processes."""
    from torch import distributed

    for name in ("gloo", "nccl"):
        able = distributed.is_available() and distributed.is_backend_available(name)
        yield name, "available" if able else "not in this torch", *_no(able)


def probe_folders() -> Entries:
    """Probe the folders of caches, runs and temporary files: rights and free space."""
    import datasets
    from huggingface_hub import constants

    place = "to a folder that you may write to"
    yield _folder("HF_HOME", constants.HF_HOME, f"set HF_HOME {place}")
    cache = datasets.config.HF_DATASETS_CACHE
    yield _folder("datasets cache", cache, f"set HF_DATASETS_CACHE {place}")
    yield _folder("runs", "runs", f"change {place}, or set run.dir")
    yield _folder("temporary", tempfile.gettempdir(), f"set TMPDIR {place}")


def _folder(name: str, path: str | Path, advice: str) -> tuple[str, ...]:
    """Try to write to a folder, or to the nearest one above it that exists."""
    absolute = Path(path).absolute()
    parent = next(place for place in (absolute, *absolute.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free / 1e9
    except OSError as error:
        words = f"{_home(path)}: not writable ({error.strerror or _reason(error)})"
        failing = "warning" if name == "HF_HOME" else "broken"  # the hub is not essential
        return name, words, failing, advice
    words = f"{_home(path)}: writable, {free:.1f} GB free"
    if free < ROOM_GB:
        return name, words, "warning", "free some room: checkpoints and caches may not fit"
    return name, words


def probe_hub() -> Entries:
    """Probe whether models and data can be downloaded."""
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield "hub", "offline mode is set (HF_HUB_OFFLINE): caches only", "no"
        return
    host = urlsplit(constants.ENDPOINT).hostname or ""
    reason = _failure(lambda: socket.create_connection((host, 443), HUB_SECONDS).close())
    words = f"not reachable ({reason}): local data only" if reason else "reachable"
    yield "hub", words, *_no(not reason)


def probe_extras() -> Entries:
    """Probe optional packages."""
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules.split() if importlib.util.find_spec(name) is None]
        words = f"without {', '.join(missing)}: pip install 'textdiff[{extra}]'"
        yield extra, words if missing else "installed", *_no(not missing)


# Each probe, and whether training depends on it.
PROBES: tuple[tuple[Callable[[], Entries], bool], ...] = (
    (probe_versions, True),
    (probe_machine, False),
    (probe_devices, True),
    (probe_attention, True),
    (probe_compile, False),
    (probe_distributed, False),
    (probe_folders, True),
    (probe_hub, False),
    (probe_extras, False),
)


def _no(able: object) -> tuple[str, ...]:
    return () if able else ("no",)


def _failure(call: Callable[[], object]) -> str | None:
    """Return why a call fails, in one line; None when it does not."""
    try:
        call()
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    return _home(first_line(error))


def _home(path: Path | str) -> str:
    home = str(Path.home())
    return str(path).replace(home, "~") if len(home) > 1 else str(path)


MARKS = {"ok": (" ", ""), "no": ("-", ""), "warning": ("!", "yellow"), "broken": ("x", "red")}


def _print_lines(findings: list[Finding], able: bool) -> None:
    """Print one line each, wrapped under its own value on a terminal and whole in a file."""
    from rich.text import Text

    console = make_console()
    columns = console.width if console.is_terminal else 10**6
    width = max(len(finding.name) for finding in findings)

    def put(line: str, indent: int, style: str) -> None:
        filled = textwrap.fill(line, columns, subsequent_indent=" " * indent)
        console.print(Text(filled, style=style), soft_wrap=True)

    for section, entries in groupby(findings, key=lambda finding: finding.section):
        put(section, 0, "bold")
        for finding in entries:
            mark, style = MARKS[finding.state]
            put(f"{mark} {finding.name:{width}}  {finding.value}", width + 4, style)
            if finding.advice:
                put(f"{'':{width + 4}}-> {finding.advice}", width + 7, "")
    wrong = "Something essential is broken: see the lines marked x."
    console.print("\nTraining can run here." if able else f"\n{wrong}", highlight=False)
