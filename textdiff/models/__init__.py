"""The denoiser and its configuration, registered with transformers' Auto classes.

Modules here import each other relatively and nothing else of textdiff, so that they travel with a
checkpoint.
"""

from transformers import AutoConfig, AutoModelForMaskedLM

from .cache import CacheSlice
from .configuration import TextDiffusionConfig
from .denoiser import TextDiffusionModel
from .layout import CAUSAL, FULL, Layout, sampling_layout, shift_right, training_layout

AutoConfig.register("textdiff", TextDiffusionConfig)
AutoModelForMaskedLM.register(TextDiffusionConfig, TextDiffusionModel)
TextDiffusionConfig.register_for_auto_class()
TextDiffusionModel.register_for_auto_class("AutoModelForMaskedLM")

__all__ = [
    "CAUSAL",
    "FULL",
    "CacheSlice",
    "Layout",
    "TextDiffusionConfig",
    "TextDiffusionModel",
    "sampling_layout",
    "shift_right",
    "training_layout",
]
