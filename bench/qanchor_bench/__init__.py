"""Measurements of Q-Anchor; bench/README.md says what every number means."""
