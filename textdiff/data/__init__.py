"""Corpora, tokenizers and training sequences: from a source of text to rows of token ids."""
