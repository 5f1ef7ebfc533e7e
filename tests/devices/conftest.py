"""Makes the helpers of other tests, and the stages of `scripts/check_gpu.py`, importable here."""

import sys
from pathlib import Path

for folder in ("exact", "sampling", "train", "../scripts"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
