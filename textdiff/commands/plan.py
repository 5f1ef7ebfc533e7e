"""`textdiff plan`: memory per device, the largest micro-batch and the speed, before a run."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import load_config, take_option
from textdiff.errors import ConfigError, DataError
from textdiff.view.progress import make_console, print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.config import Config
    from textdiff.planning.sizes import RunSizes

OPTIONS = (
    "[--devices N] [--memory 80GB] [--flops 300TFLOPS] [--efficiency 0.4] [--device cpu|cuda] "
    "[--vocabulary V] [--json] "
)
# Option: its default and an example.
VALUES = {
    "devices": ("1", "8"),
    "memory": ("", "80GB"),
    "flops": ("", "300TFLOPS"),
    "efficiency": ("0.4", "0.4"),
    "device": ("", "cuda"),
    "vocabulary": ("", "50258"),
}
UNITS = "KMGTP"
# A character vocabulary is only known once the corpus is read.
CHARACTERS = 128


def plan(arguments: Sequence[str]) -> int:
    """Run `textdiff plan CONFIG [options] [--section.key VALUE ...]`."""
    words, given = [word for word in arguments if word != "--json"], {}
    for name, (default, example) in VALUES.items():
        words, given[name] = take_option(words, f"--{name}", default, f"for example {example}")
    devices = _whole("--devices", given["devices"])
    memory = quantity("--memory", given["memory"], "B") if given["memory"] else None
    flops = quantity("--flops", given["flops"], "FLOPS") if given["flops"] else None
    efficiency = _share(given["efficiency"])
    config = load_config(words, "textdiff plan", OPTIONS)
    quiet_libraries()
    device = _device(given["device"])
    vocabulary, note = _vocabulary(config, given["vocabulary"])
    _check_split(config, devices)
    run = _sizes(config, vocabulary, device, devices)
    if run.vocabulary > vocabulary:
        note += f", and {run.vocabulary - vocabulary} rows beyond it"
    record = _record(run, memory)
    record |= _times(record, flops, efficiency)
    if "--json" in arguments:
        print_json({**record, "vocabulary_note": note})
    else:
        _show(record, note)
    return 0


def quantity(name: str, words: str, unit: str) -> float:
    """Read `80GB`, `16GiB`, `300TFLOPS` or a plain number as a number of bytes or operations.

    Raises:
        ConfigError: anything else, or nothing above 0.
    """
    text = words.upper().replace("FLOP/S", "FLOPS").replace(" ", "").removesuffix(unit)
    match = re.fullmatch(rf"([^{UNITS}I]+)(?:([{UNITS}])(I?))?", text)
    try:
        power = (UNITS.index(match[2]) + 1) if match and match[2] else 0
        value = float(match[1] if match else "") * (1024.0 if match and match[3] else 1e3) ** power
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        example = "80GB or 16GiB" if unit == "B" else "300TFLOPS"
        raise ConfigError(
            f"{name} {words}: give a size such as {example}", code="unreadable_quantity"
        )
    return value


def _whole(name: str, words: str, least: int = 1, noun: str = "a whole number, at least 1") -> int:
    if not words.isdecimal() or int(words) < least:
        raise ConfigError(f"{name} {words}: give {noun}")
    return int(words)


def _share(words: str) -> float:
    try:
        value = float(words)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"--efficiency {words}: give a fraction such as 0.4, at most 1")
    return value


def _device(name: str) -> str:
    if name not in ("", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: the kind of device to plan for is cpu or cuda")
    from textdiff.export.loading import default_device

    return name or ("cuda" if default_device() == "cuda" else "cpu")


def _vocabulary(config: "Config", given: str) -> tuple[int, str]:
    """Return V and its origin."""
    from textdiff.data.sections import BpeTokenizer

    section = config.tokenizer
    if given:
        return _whole("--vocabulary", given, 4, "at least 4 ids"), "as given"
    if isinstance(section, BpeTokenizer):
        return section.vocab_size, "at most; a small corpus may yield fewer tokens"
    if section.kind == "char":
        return CHARACTERS, "assumed: characters are counted in training; --vocabulary says better"
    from textdiff.data.tokenizer import vocabulary_size

    try:
        return vocabulary_size(section.prepare(())), "of the tokenizer"
    except DataError as error:
        raise DataError(f"{error}; or say how many ids it has: --vocabulary 50258") from None


def _check_split(config: "Config", devices: int) -> None:
    train = config.train
    if train.global_batch_size % (train.micro_batch_size * devices):
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of "
            f"micro_batch_size {train.micro_batch_size} x {devices} devices; set "
            f"--train.micro-batch-size to a divisor of {train.global_batch_size // devices or 1}"
        )


def _sizes(config: "Config", vocabulary: int, device: str, devices: int) -> "RunSizes":
    import torch

    from textdiff.planning.sizes import run_sizes
    from textdiff.train.optim import resolve_precision

    precision: str = config.train.mixed_precision
    if device == "cpu" or precision != "auto":  # every GPU is planned with bfloat16
        precision = resolve_precision(precision, torch.device("cpu"))
    return run_sizes(config, vocabulary, precision != "fp32", device == "cpu", devices)


def _record(run: "RunSizes", memory: float | None) -> dict[str, Any]:
    """Return sizes and memory as plain data; bytes."""
    from dataclasses import replace

    from textdiff.planning.memory import largest_micro_batch, peak_memory

    ways = {"one device": False} if run.devices == 1 else {"DDP": False, "FSDP2": True}
    variants = []
    for way, sharded in ways.items():
        for recomputed in (False, True):
            model = run.config.model.model_copy(update={"gradient_checkpointing": recomputed})
            config = run.config.model_copy(update={"model": model})
            planned = replace(run, config=config, sharded=sharded)
            rows = None if memory is None else largest_micro_batch(planned, memory)
            sizes = {"bytes": peak_memory(planned), "largest_micro_batch": rows}
            variants.append({"way": way, "gradient_checkpointing": recomputed, **sizes})
    return {
        "parameters": run.counts.total,
        "vocabulary": run.vocabulary,
        "device": "cpu" if run.chunked else "cuda",
        "devices": run.devices,
        "precision": "bf16" if run.half else "fp32",
        "sequence_length": run.config.data.sequence_length,
        "streams": run.streams,
        "micro_batch_size": run.config.train.micro_batch_size,
        "accumulation": run.accumulation,
        "gradient_checkpointing": run.config.model.gradient_checkpointing,
        "memory_bytes": memory,
        "variants": variants,
        "flops_per_token": run.flops.model,
        "computed_flops_per_token": run.flops.computed,
        "training_tokens": run.training_tokens,
    }


def _times(record: dict[str, Any], flops: float | None, efficiency: float) -> dict[str, Any]:
    """Return the speed at a fraction of what one device is sold with, and the run's duration."""
    rate = flops and record["devices"] * flops * efficiency
    speed = rate and rate / record["computed_flops_per_token"]
    return {
        "efficiency": efficiency,
        "tokens_per_second": speed,
        "training_seconds": record["training_tokens"] / speed if speed else None,
    }


ROWS = {
    "weights": "weights, float32",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "average": "averaged weights",
    "communication": "buckets, gathered weights",
    "low_precision": "bf16 copies of weights",
    "activations": "activations",
    "backward": "work space, backward",
    "head": "work space, head and loss",
    "peak": "peak, alive at once",
    "resident": "peak of the process",
}


def _show(record: dict[str, Any], note: str) -> None:
    console = make_console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=not console.is_terminal)

    say(
        f"{record['parameters']:,} parameters, vocabulary {record['vocabulary']:,} ({note}); "
        f"{record['devices']} x {record['device']}, {record['precision']}"
    )
    streams = " in two streams (clean and noisy)" if record["streams"] == 2 else ""
    say(
        f"micro-batch {record['micro_batch_size']} x {record['sequence_length']} tokens{streams}, "
        f"{record['accumulation']} per step and device"
    )
    say("memory per device in GB (10^9 bytes); activations of the blocks kept or recomputed:")
    console.print(_table(record))
    say("* the config's setting (model.gradient_checkpointing); parts do not all peak together")
    if record["device"] == "cpu":
        say("The process also holds about 0.48 GB of Python and libraries.")
    else:
        say("Not counted: the CUDA context and what the allocator holds in reserve.")
    needed, computed = record["flops_per_token"], record["computed_flops_per_token"]
    more = "" if computed == needed else f"; {computed / 1e6:,.1f} are computed, some again"
    say(f"{needed / 1e6:,.1f} MFLOP per training token{more}")
    if record["tokens_per_second"]:
        say(
            f"{record['tokens_per_second']:,.0f} tokens/s at {record['efficiency']:.0%} of the "
            f"given FLOP/s; {record['training_tokens']:.3g} tokens take "
            f"{_duration(record['training_seconds'])}"
        )


def _table(record: dict[str, Any]) -> Any:
    """Return rich's table of memory, one column per way to run."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for variant in record["variants"]:
        recomputed = variant["gradient_checkpointing"]
        mark = " *" if recomputed == record["gradient_checkpointing"] else ""
        how = "recomputed" if recomputed else "kept"
        table.add_column(f"{variant['way']}\n{how}{mark}", justify="right")
    for key, words in ROWS.items():
        values = [variant["bytes"][key] for variant in record["variants"]]
        if any(values) and not (key == "resident" and record["device"] != "cpu"):
            table.add_row(words, *(f"{value / 1e9:.3f}" for value in values))
        if key == "head":
            table.add_section()
    if record["memory_bytes"]:
        table.add_section()
        rows = [str(variant["largest_micro_batch"] or "none") for variant in record["variants"]]
        table.add_row(f"largest micro-batch in {record['memory_bytes'] / 1e9:.4g} GB", *rows)
    return table


def _duration(seconds: float) -> str:
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
