"""Soft prompts behind frozen weights: tuned scenarios, Q-Anchor Eq. (7), and compiled ones."""
