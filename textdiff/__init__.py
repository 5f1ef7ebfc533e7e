"""textdiff: discrete text-diffusion language models.

`from textdiff import TextDiffusion` is what Python users hold; the command line is `textdiff`.
Names are imported on first use, so that `import textdiff` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textdiff.export.published import load_denoiser
    from textdiff.models import TextDiffusionConfig, TextDiffusionModel
    from textdiff.pipeline import TextDiffusion

__version__ = "0.1.0"

_HOME = {
    "TextDiffusion": "textdiff.pipeline",
    "TextDiffusionConfig": "textdiff.models",
    "TextDiffusionModel": "textdiff.models",
    "load_denoiser": "textdiff.export.published",
}

__all__ = [
    "TextDiffusion",
    "TextDiffusionConfig",
    "TextDiffusionModel",
    "__version__",
    "load_denoiser",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
