"""`textdiff estimate`: memory per device, the largest micro-batch and the speed, before a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import load_config, take_option
from textdiff.errors import ConfigError, DataError
from textdiff.view.progress import make_console, print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.config import Config
    from textdiff.planning import Memory, Plan

OPTIONS = (
    "[--devices N] [--memory 80GB] [--flops 300TFLOPS] [--efficiency 0.4] [--device cpu|cuda] "
    "[--vocabulary V] [--json] "
)
EXAMPLES = {
    "devices": "8",
    "memory": "80GB",
    "flops": "300TFLOPS",
    "efficiency": "0.4",
    "device": "cuda",
    "vocabulary": "50258",
}
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
# A character vocabulary is only known once the corpus is read.
CHARACTERS = 128


def estimate(arguments: Sequence[str]) -> int:
    """`textdiff estimate CONFIG [options] [--section.key VALUE ...]`."""
    words = list(arguments)
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    given = {}
    for name, example in EXAMPLES.items():
        words, given[name] = take_option(words, f"--{name}", "", f"for example {example}")
    devices = _whole("--devices", given["devices"] or "1")
    memory = quantity("--memory", given["memory"], "B") if given["memory"] else None
    flops = quantity("--flops", given["flops"], "FLOPS") if given["flops"] else None
    efficiency = _share(given["efficiency"] or "0.4")
    config = load_config(words, "textdiff estimate", OPTIONS)
    quiet_libraries()
    device = _device(given["device"])
    vocabulary, note = _vocabulary(config, given["vocabulary"])
    _check_split(config, devices)
    record = _record(config, vocabulary, device, devices, memory, flops, efficiency)
    if as_json:
        print_json({**record, "vocabulary_note": note})
    else:
        _show(record, note)
    return 0


def quantity(name: str, words: str, unit: str) -> float:
    """`80GB`, `16GiB`, `300TFLOPS` or a plain number as a number of bytes or operations.

    Raises:
        ConfigError: anything else, or nothing above 0.
    """
    text = words.upper().replace("FLOP/S", "FLOPS").replace(" ", "")
    text = text.removesuffix(unit)
    binary = text.endswith("I")
    text = text.removesuffix("I")
    power = UNITS.get(text[-1:], 1.0)
    if binary:
        power = 1024.0 ** (list(UNITS).index(text[-1]) + 1) if text[-1:] in UNITS else 0.0
    digits = text[:-1] if text[-1:] in UNITS else text
    try:
        value = float(digits) * power
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        example = "80GB or 16GiB" if unit == "B" else "300TFLOPS"
        raise ConfigError(f"{name} {words}: give a size such as {example}")
    return value


def _whole(name: str, words: str) -> int:
    if not words.isdecimal() or int(words) < 1:
        raise ConfigError(f"{name} {words}: give a whole number, at least 1")
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
    if name and name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: the kind of device to plan for is cpu or cuda")
    if name:
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _vocabulary(config: "Config", given: str) -> tuple[int, str]:
    """V, and where it comes from."""
    section = config.tokenizer
    if given:
        size = _whole("--vocabulary", given)
        if size < 4:
            raise ConfigError(f"--vocabulary {given}: give at least 4 ids")
        return size, "as given"
    if section.kind == "bpe":
        return section.vocab_size, "at most; a small corpus may yield fewer tokens"
    if section.kind == "char":
        return CHARACTERS, "assumed: characters are counted in training; --vocabulary says better"
    from textdiff.data import prepare_tokenizer, vocabulary_size

    try:
        return vocabulary_size(prepare_tokenizer(section, ())), "of the tokenizer"
    except DataError as error:
        raise DataError(f"{error}; or say how many ids it has: --vocabulary 50258") from None


def _check_split(config: "Config", devices: int) -> None:
    train = config.train
    if train.global_batch_size % (train.micro_batch_size * devices):
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} is no multiple of "
            f"micro_batch_size {train.micro_batch_size} x {devices} devices; set "
            f"--train.micro-batch-size to a divisor of {train.global_batch_size // devices or 1}"
        )


def _record(
    config: "Config",
    vocabulary: int,
    device: str,
    devices: int,
    memory: float | None,
    flops: float | None,
    efficiency: float,
) -> dict[str, Any]:
    """Everything that is shown, as plain data; sizes in bytes."""
    from textdiff.planning import plan, tokens_per_second, training_flops

    half = config.train.mixed_precision == "bf16"
    if config.train.mixed_precision == "auto":
        half = device == "cuda" or _native_bf16()

    def planned(sharded: bool, checkpointing: bool) -> "Plan":
        model = config.model.model_copy(update={"gradient_checkpointing": checkpointing})
        changed = config.model_copy(update={"model": model})
        return plan(changed, vocabulary, half, device == "cpu", devices, sharded)

    base = planned(False, config.model.gradient_checkpointing)
    ways = [("one device" if devices == 1 else "DDP", False)]
    ways += [("FSDP2", True)] if devices > 1 else []
    variants = [
        _variant(name, planned(sharded, recomputed), memory)
        for name, sharded in ways
        for recomputed in (False, True)
    ]
    batch = config.train.global_batch_size * config.data.sequence_length
    speed = tokens_per_second(base, flops, efficiency) if flops else None
    return {
        "parameters": base.counts.total,
        "vocabulary": vocabulary,
        "device": device,
        "devices": devices,
        "precision": "bf16" if half else "fp32",
        "sequence_length": config.data.sequence_length,
        "streams": base.streams,
        "micro_batch_size": config.train.micro_batch_size,
        "accumulation": base.accumulation,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "memory_bytes": memory,
        "variants": variants,
        "flops_per_token": training_flops(base),
        "efficiency": efficiency,
        "tokens_per_second": speed,
        "training_tokens": batch * config.train.steps,
        "training_seconds": batch * config.train.steps / speed if speed else None,
    }


def _native_bf16() -> bool:
    import torch

    from textdiff.train.optim import native_bf16

    return native_bf16(torch.device("cpu"))


def _variant(name: str, plan: "Plan", memory: float | None) -> dict[str, Any]:
    from dataclasses import asdict

    from textdiff.planning import largest_micro_batch, peak_memory

    found: Memory = peak_memory(plan)
    return {
        "way": name,
        "gradient_checkpointing": plan.config.model.gradient_checkpointing,
        "bytes": asdict(found),
        "largest_micro_batch": None if memory is None else largest_micro_batch(plan, int(memory)),
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
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

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
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for variant in record["variants"]:
        how = "recomputed" if variant["gradient_checkpointing"] else "kept"
        chosen = variant["gradient_checkpointing"] == record["gradient_checkpointing"]
        mark = " *" if chosen else ""
        table.add_column(f"{variant['way']}\n{how}{mark}", justify="right")
    for key, words in ROWS.items():
        values = [variant["bytes"][key] for variant in record["variants"]]
        if any(values) and not (key == "resident" and record["device"] != "cpu"):
            table.add_row(words, *(f"{value / 1e9:.3f}" for value in values))
        if key == "head":
            table.add_section()
    if record["memory_bytes"]:
        table.add_section()
        words = f"largest micro-batch in {record['memory_bytes'] / 1e9:.4g} GB"
        found = [variant["largest_micro_batch"] for variant in record["variants"]]
        table.add_row(words, *(str(rows) if rows else "none" for rows in found))
    console.print(table)
    say("* what the config says (model.gradient_checkpointing); parts do not all peak together")
    if record["device"] == "cpu":
        say("The process also holds about 0.48 GB of Python and libraries.")
    else:
        say("Not counted: the CUDA context and what the allocator holds in reserve.")
    say(f"{record['flops_per_token'] / 1e6:,.1f} MFLOP per training token")
    if record["tokens_per_second"]:
        say(
            f"{record['tokens_per_second']:,.0f} tokens/s at {record['efficiency']:.0%} of the "
            f"given FLOP/s; {record['training_tokens']:.3g} tokens take "
            f"{_duration(record['training_seconds'])}"
        )


def _duration(seconds: float) -> str:
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
