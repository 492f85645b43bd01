"""UserU questions and answers written by a language model (D_uqa), or by the built-in rules.

The way of one user, Q-Anchor section 2.1: pick the topics the profile says most about (`pool`),
draft a question and an answer to each, reflect: keep, revise or drop every answer (`synthesis`).
Who does the three is an author: `language_model` asks an OpenAI-compatible endpoint through
`asking` (`store`, `budget`, `endpoint`), `builtin` computes them with `qanchor.data.grounded`.
Must not know labels, nor anything a user did from the as-of moment on.
"""
