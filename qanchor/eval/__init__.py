"""Frozen embeddings judged by linear probes, beside baselines."""
