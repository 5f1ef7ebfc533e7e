"""Exams by lm-evaluation-harness: its model class, its tasks, and how sure their answers are."""
