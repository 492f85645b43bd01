"""Measurements; see README.md for what every number means. Not part of the installed packages."""
