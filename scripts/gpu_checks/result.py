"""Lines so far: printed at once, and written as JSON with each of them."""

import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from gpu_checks.checks import Check
from textdiff.export.records import code_record
from textdiff.storage import whole_file
from textdiff.train.optim import native_bf16


class Result:
    """Result of some checks, of which the file is rewritten with every line.

    Until it is finished the file says that it has not passed: a program that is killed cannot
    correct it.

    Args:
        device: that is checked.
        output: the file; None: nothing is written.
    """

    def __init__(self, device: torch.device, output: Path | None):
        self.device, self.output = device, output
        self.checks: list[Check] = []

    def take(self, check: Check) -> None:
        """Print and write one more line."""
        self.checks.append(check)
        print(line_of(check), flush=True)
        self.write()

    def write(self, finished: bool = False) -> None:
        """Write the file."""
        if self.output is None:
            return
        content = record(self.checks, self.device)
        content["passed"] = content["passed"] and finished
        with whole_file(self.output) as scratch:
            scratch.write_text(json.dumps(finite(content), indent=1) + "\n")


def line_of(check: Check) -> str:
    """Return one line of the output."""
    verdict = "skipped" if check.skipped else "ok" if check.passed else "FAILED"
    if math.isinf(check.limit):
        return f"        {check.name} = {check.found:.4g} {check.note}"
    value = "" if check.found is None else f" = {check.found:.2e}, at most {check.limit:g}"
    return f"{verdict:7} {check.name}{value} {check.note}".rstrip()


def record(checks: list[Check], device: torch.device) -> dict:
    """Return the result with what it depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "native_bf16": native_bf16(device),
        "code": code_record(),
        "passed": all(check.passed for check in checks),
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
    }


def finite(value: object) -> object:
    """Return a record without infinite numbers, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
