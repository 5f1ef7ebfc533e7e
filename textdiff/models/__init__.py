"""The denoiser and its configuration, registered with transformers' Auto classes.

Modules here import each other relatively and nothing else of textdiff, so that they travel with a
checkpoint. Without subfolders: transformers copies the code into one folder.
"""

from transformers import AutoConfig, AutoModelForMaskedLM

from .cache import CacheSlice as CacheSlice
from .configuration import TextDiffusionConfig as TextDiffusionConfig
from .denoiser import TextDiffusionModel as TextDiffusionModel
from .interface import Denoiser as Denoiser
from .interface import Reads as Reads
from .interface import left_neighbours as left_neighbours
from .layers import Previous as Previous
from .layout import CAUSAL as CAUSAL
from .layout import FULL as FULL
from .layout import Layout as Layout
from .layout import hide_starts as hide_starts
from .layout import sampling_layout as sampling_layout
from .layout import shift_right as shift_right
from .layout import training_layout as training_layout

AutoConfig.register("textdiff", TextDiffusionConfig)
AutoModelForMaskedLM.register(TextDiffusionConfig, TextDiffusionModel)
TextDiffusionConfig.register_for_auto_class()
TextDiffusionModel.register_for_auto_class("AutoModelForMaskedLM")
