"""Checkpoint to bundle, and its proof. May import qanchor, never the server."""
