"""Stages of `scripts/check_gpu.py`, and what they share."""
