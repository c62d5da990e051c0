"""Corpora: located, verified, tokenised, batched."""
