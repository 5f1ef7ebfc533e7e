"""The figures of docs/scaling.md are those of `textdiff plan` with the flags that it names."""

import json
import re
import shlex

import pytest

from textdiff.cli import main

PART = ("weights", "gradients", "average", "optimizer")


def planned(page: str, capsys, flags: list[str], devices: int) -> dict:
    """Report of the page's command for a size, on some devices."""
    command = re.search(r"```bash\ntextdiff (plan .*?)\n```", page, flags=re.S)[1]
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    capsys.readouterr()
    assert main([*words, "--json", *flags, "--devices", str(devices)]) == 0
    return json.loads(capsys.readouterr().out)


def figure(value: float) -> str:
    """Three digits; thousands with commas."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def gigabytes(*counts: int) -> str:
    return " | ".join(figure(count / 1e9) for count in counts)


def speed_row(one: dict, eight: dict, many: dict) -> str:
    days = [figure(record["training_seconds"] / 86400) for record in (one, eight, many)]
    values = [f"{one['parameters'] / 1e6:,.0f} M", figure(one["flops_per_token"] / 1e9)]
    return " | ".join([*values, figure(one["tokens_per_second"]), *days])


def memory_row(one: dict, eight: dict, many: dict) -> str:
    kept, again = (v["bytes"] for v in one["variants"])
    sharded = [
        next(v["bytes"] for v in record["variants"] if v["way"] == "FSDP2")
        for record in (eight, many)
    ]
    state = [sum(b[part] for part in PART) for b in (kept, *sharded)]
    return gigabytes(*state, kept["activations"], again["activations"], kept["head"])


def fit_row(one: dict, eight: dict, many: dict) -> str:
    cells = []
    for record in (one, eight, many):
        last = [v for v in record["variants"] if v["way"] in ("one device", "FSDP2")]
        cells += [f"{figure(v['bytes']['peak'] / 1e9)} ({v['largest_micro_batch']})" for v in last]
    return " | ".join(cells)


@pytest.mark.parametrize("size", ["110 M", "1 B", "8 B"])
def test_figures_are_those_of_the_command(root, capsys, monkeypatch, size):
    monkeypatch.chdir(root)
    page = (root / "docs" / "scaling.md").read_text()
    flags = shlex.split(re.search(rf"^\| {size} \| `(.*?)` \|$", page, flags=re.M)[1])
    records = [planned(page, capsys, flags, devices) for devices in (1, 8, 64)]
    rows = [make(*records) for make in (speed_row, memory_row, fit_row)]
    assert [row for row in rows if f"| {size} | {row} |" not in page] == []
