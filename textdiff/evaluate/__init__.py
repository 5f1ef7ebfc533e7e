"""Evaluation above the pipeline: results with everything that they depend on."""

from textdiff.evaluate.record import evaluation_record

__all__ = ["evaluation_record"]
