"""The denoiser and its configuration, registered with transformers' Auto classes.

Modules here import each other relatively and nothing else of textdiff, so that they travel with a
checkpoint.
"""

from transformers import AutoConfig, AutoModelForMaskedLM

from .cache import CacheView
from .configuration import TextDiffusionConfig
from .denoiser import TextDiffusionModel
from .layout import CAUSAL, FULL, Layout, late, sampling_layout, training_layout

AutoConfig.register("textdiff", TextDiffusionConfig)
AutoModelForMaskedLM.register(TextDiffusionConfig, TextDiffusionModel)
TextDiffusionConfig.register_for_auto_class()
TextDiffusionModel.register_for_auto_class("AutoModelForMaskedLM")

__all__ = [
    "CAUSAL",
    "FULL",
    "CacheView",
    "Layout",
    "TextDiffusionConfig",
    "TextDiffusionModel",
    "late",
    "sampling_layout",
    "training_layout",
]
