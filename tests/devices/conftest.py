"""Makes the helpers of other tests importable here."""

import sys
from pathlib import Path

for folder in ("exact", "sampling", "train"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
