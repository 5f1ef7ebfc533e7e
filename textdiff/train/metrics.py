"""`metrics.jsonl`: one JSON object per logged step and per evaluation, floats in full."""

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends to a run's metrics; lines after the step that a run resumes from are cut first.

    Args:
        path: the file.
        step: the step the run continues from (0: a fresh file).
        bound_step: the step of the newest validation bound that it continues with; one that was
            written after the checkpoint will be computed and written again.
    """

    def __init__(self, path: Path, step: int, bound_step: int):
        self.path = path
        kept = []
        for line in self._lines() if step > 0 else []:
            values = json.loads(line)
            if values["step"] <= (bound_step if "bound_nats" in values else step):
                kept.append(line)
        # Renamed into place: a kill between emptying and filling would lose what is kept.
        scratch = path.with_name(f".{path.name}")
        scratch.write_text("".join(kept), encoding="utf-8")
        scratch.replace(path)

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
