"""Evaluation above the pipeline: results with everything that they depend on."""

from textdiff.evaluate.bound_record import evaluation_record

__all__ = ["evaluation_record"]
