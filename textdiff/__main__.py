"""`python -m textdiff`, for `accelerate launch -m textdiff`."""

import sys

from textdiff.cli import main

sys.exit(main())
