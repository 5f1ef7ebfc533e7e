"""Needs of a run, computed before it: memory per device, and operations."""
