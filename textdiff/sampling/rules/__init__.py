"""Decoding rules by the names that `--rule` and configs use; one file each."""

from textdiff.sampling.rules.ancestral import ancestral
from textdiff.sampling.rules.rule import Denoise, Rule, Step, Uniforms

RULES: dict[str, Rule] = {"ancestral": ancestral}

__all__ = ["RULES", "Denoise", "Rule", "Step", "Uniforms", "ancestral"]
