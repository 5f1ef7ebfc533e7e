"""`textdiff doctor`: what this machine can run, in a form to paste into bug reports.

Every probe is caught: one that fails is a line of the report. Nothing secret is shown: no tokens,
no values of the environment but the flags named here, and `~` for the home directory.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from textdiff.commands.arguments import JsonFlag
from textdiff.commands.threads import described
from textdiff.view.progress import make_console, print_json, quiet_libraries

if TYPE_CHECKING:
    import torch
    from rich.console import Console

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "rich",
    "tensorboard",
)
EXTRAS = {
    "flash": ("flash_attn",),
    "eval": ("lm_eval", "mauve", "matplotlib"),
    "dev": ("pytest", "ruff", "mypy"),
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
ROOM_GB = 1.0  # less than this is said to be little
HUB_SECONDS = 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: what it is about.
        name: of what was probed.
        value: what was found.
        state: `ok`, `no` (cannot be used here, and need not be), `warning` or `broken` (training
            cannot run).
        advice: what to do about it.
    """

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
    broken = [finding for finding in findings if finding.state == "broken"]
    (_print_json if json else _print_lines)(findings, not broken)
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    """All probes, one after the other; a failure is a finding."""
    for probe, essential in PROBES:
        try:
            yield from probe()
        except Exception as error:
            yield Finding(
                probe.__name__.removeprefix("probe_"),
                "probe",
                f"failed: {_reason(error)}",
                "broken" if essential else "warning",
                "reinstall textdiff and its dependencies" if essential else "",
            )


def probe_versions() -> Iterator[Finding]:
    """textdiff, Python, the libraries and git."""
    from textdiff import __version__
    from textdiff.export.provenance import PACKAGE, commit_of

    commit = commit_of(PACKAGE.parent)
    yield Finding("versions", "textdiff", __version__ + (f" ({commit[:12]})" if commit else ""))
    yield Finding("versions", "python", platform.python_version())
    for name in LIBRARIES:
        yield _library(name)
    yield Finding("versions", "git", _git())


def _library(name: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("versions", name, "not installed", "broken", f"pip install {name}")
    try:
        __import__(name)
    except Exception as error:
        found = f"{version}, cannot be imported: {_reason(error)}"
        return Finding("versions", name, found, "broken", f"pip install --force-reinstall {name}")
    return Finding("versions", name, version)


def _git() -> str:
    if shutil.which("git") is None:
        return "not found"
    done = subprocess.run(["git", "--version"], capture_output=True, text=True, timeout=5)
    return done.stdout.strip().removeprefix("git version ")


def probe_machine() -> Iterator[Finding]:
    """Platform, processor and memory."""
    import torch

    yield Finding("machine", "platform", platform.platform())
    name, flags = _processor()
    yield Finding("machine", "processor", " ".join([name, *flags]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "cores", f"{cores} usable, torch uses {torch.get_num_threads()}")
    yield Finding("machine", "idle threads", described())
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield Finding("machine", "memory", f"{size / 1e9:.1f} GB")


def _processor() -> tuple[str, list[str]]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine(), []
    text = path.read_text()
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    known = flags[1].split() if flags else []
    return name[1] if name else platform.machine(), [flag for flag in CPU_FLAGS if flag in known]


def probe_devices() -> Iterator[Finding]:
    """Accelerators, and which precision each device computes natively."""
    import torch

    from textdiff.train.optim import native_bf16

    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found = (
            f"{facts.name}, {facts.total_memory / 1e9:.1f} GB, capability "
            f"{facts.major}.{facts.minor}"
        )
        yield Finding("devices", f"cuda:{index}", found)
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "available")
    device = _device()
    yield Finding("devices", "default", device)
    half = native_bf16(torch.device(device))
    yield Finding("devices", "float32", "native")
    yield Finding(
        "devices",
        "bfloat16",
        "native" if half else "emulated; mixed_precision: auto takes fp32",
        "ok" if half else "no",
    )


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def probe_attention() -> Iterator[Finding]:
    """Each backend, tried on a tiny network: forward, and backward where it says that it can."""
    import torch

    quiet_libraries()
    from textdiff.models.attention import BACKENDS, unavailable

    device = torch.device(_device())
    for backend in BACKENDS:
        said = []
        for gradients in (True, False):
            reason = unavailable(backend, device, gradients)
            if reason is None:
                reason = _failure(partial(_attend, backend, device, gradients))
            said.append(reason)
        training, inference = said
        if training is None and inference is None:
            yield Finding("attention", backend, f"trains and infers on {device.type}")
            continue
        words = training or ""
        if inference is None:
            words = f"infers only: {training}"
        state = "broken" if backend == "sdpa" else "no"
        advice = "reinstall torch" if state == "broken" else ""
        yield Finding("attention", backend, words, state, advice)


def _attend(backend: str, device: "torch.device", gradients: bool) -> None:
    import torch

    from textdiff.models import TextDiffusionConfig, TextDiffusionModel

    config = TextDiffusionConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config._attn_implementation = backend
    model = TextDiffusionModel(config).to(device)
    if backend == "flash_attention_2":  # which has no float32
        model = model.to(torch.bfloat16)
    ids = torch.zeros(1, 16, dtype=torch.int64, device=device)
    with torch.set_grad_enabled(gradients):
        logits = model(ids).logits
        if gradients:
            logits.sum().backward()


def probe_compile() -> Iterator[Finding]:
    """Whether torch.compile finds what it generates code with."""
    if _device() == "cuda":
        found = importlib.util.find_spec("triton") is not None
        words = "triton" if found else "triton is not installed"
    else:
        name = next((n for n in (os.environ.get("CXX"), "g++", "clang++") if n), "g++")
        compilers = [n for n in (name, "g++", "clang++", "cl") if shutil.which(n)]
        found = bool(compilers)
        words = Path(compilers[0]).name if found else "no C++ compiler (g++ or clang++) found"
    yield Finding("compile", "torch.compile", words, "ok" if found else "no")


def probe_distributed() -> Iterator[Finding]:
    """Backends of several processes."""
    from torch import distributed

    if not distributed.is_available():
        yield Finding("distributed", "torch.distributed", "not built into this torch", "no")
        return
    for name, able in (
        ("gloo", distributed.is_gloo_available),
        ("nccl", distributed.is_nccl_available),
    ):
        yield Finding(
            "distributed", name, "available" if able() else "not in this torch", *_no(able())
        )


def _no(able: bool) -> tuple[str, ...]:
    return () if able else ("no",)


def probe_folders() -> Iterator[Finding]:
    """Where caches, runs and temporary files go: writable, and how much room is left."""
    import datasets
    from huggingface_hub import constants

    places = {
        "HF_HOME": Path(constants.HF_HOME),
        "datasets cache": Path(datasets.config.HF_DATASETS_CACHE),
        "runs": Path("runs"),
        "temporary": Path(tempfile.gettempdir()),
    }
    for name, path in places.items():
        yield _folder(name, path)


def _folder(name: str, path: Path) -> Finding:
    """Whether a file can be made in a folder, or in the nearest one above that exists."""
    shown = _home(path)
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free / 1e9
    except OSError as error:
        elsewhere = {
            "HF_HOME": "set HF_HOME to a folder that you may write to",
            "datasets cache": "set HF_DATASETS_CACHE to a folder that you may write to",
            "runs": "change to a folder that you may write to, or set run.dir",
            "temporary": "set TMPDIR to a folder that you may write to",
        }[name]
        found = f"{shown}: not writable ({error.strerror or _reason(error)})"
        state = "warning" if name == "HF_HOME" else "broken"  # the hub is not essential
        return Finding("folders", name, found, state, elsewhere)
    state = "ok" if free >= ROOM_GB else "warning"
    advice = "" if state == "ok" else "free some room: checkpoints and caches may not fit"
    return Finding("folders", name, f"{shown}: writable, {free:.1f} GB free", state, advice)


def probe_hub() -> Iterator[Finding]:
    """Whether models and data can be downloaded."""
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "hub", "offline mode is set (HF_HUB_OFFLINE): caches only", "no")
        return
    host = urlsplit(constants.ENDPOINT).hostname or ""
    reason = _failure(lambda: socket.create_connection((host, 443), HUB_SECONDS).close())
    words = "reachable" if reason is None else f"not reachable ({reason}): local data only"
    yield Finding("hub", "hub", words, *_no(reason is None))


def probe_extras() -> Iterator[Finding]:
    """Optional packages."""
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        words = f"without {', '.join(missing)}: pip install 'textdiff[{extra}]'"
        yield Finding("extras", extra, words if missing else "installed", *_no(not missing))


# Each probe, and whether training depends on it.
PROBES: tuple[tuple[Callable[[], Iterator[Finding]], bool], ...] = (
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


def _failure(call: Callable[[], object]) -> str | None:
    """Why a call fails, in one line; None when it does not."""
    try:
        call()
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return _home(lines[0][:160]) if lines else type(error).__name__


def _home(path: Path | str) -> str:
    home = str(Path.home())
    return str(path).replace(home, "~") if len(home) > 1 else str(path)


def _print_json(findings: list[Finding], able: bool) -> None:
    print_json({"ok": able, "findings": [asdict(f) for f in findings]})


MARKS = {"ok": " ", "no": "-", "warning": "!", "broken": "x"}


def _print_lines(findings: list[Finding], able: bool) -> None:
    """One line each; plain text, so that a pipe and a terminal give the same report."""
    from rich.text import Text

    console = make_console()
    width = max(len(finding.name) for finding in findings)
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            console.print(Text(section, style="bold"))
        line = f"{MARKS[finding.state]} {finding.name:{width}}  {finding.value}"
        _put(console, line, width + 4, {"broken": "red", "warning": "yellow"}.get(finding.state))
        if finding.advice:
            _put(console, f"{'':{width + 4}}-> {finding.advice}", width + 7, None)
    console.print()
    wrong = "Something essential is broken: see the lines marked x."
    console.print("Training can run here." if able else wrong, highlight=False)


def _put(console: "Console", line: str, indent: int, style: str | None) -> None:
    """A line, wrapped under its own value on a terminal and whole in a file."""
    import textwrap

    from rich.text import Text

    lines = [line]
    if console.is_terminal:
        lines = textwrap.wrap(line, console.width, subsequent_indent=" " * indent)
    for part in lines:
        console.print(Text(part, style=style or ""), soft_wrap=True)
