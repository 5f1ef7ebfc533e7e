"""Perplexity bounds: estimators, their errors, and what exactly is scored."""
