"""`metrics.jsonl`: one JSON object per logged step and per evaluation, floats in full."""

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends to a run's metrics; lines after the step that a run resumes from are cut first.

    Args:
        path: the file.
        step: the step the run continues from (0: a fresh file).
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step and step > 0]
        path.write_text("".join(kept), encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [
            line for line in lines if line.endswith("}\n")
        ]  # a killed run may leave half a line
