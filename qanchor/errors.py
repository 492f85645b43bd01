"""The error tree shared by training, export and serving. Knows no framework.

A message always names the field, the value received, the rule it breaks and the remedy.
"""


class QAnchorError(Exception):
    """Base of every deliberate error of this project."""


class InvalidInput(QAnchorError, ValueError):
    """A value a caller can correct; `field` is a dotted path into what the caller sent."""

    def __init__(self, field: str, value: object, rule: str, remedy: str = "") -> None:
        self.field = field
        self.value = value
        self.rule = rule
        self.remedy = remedy
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        tail = f"; {remedy}" if remedy else ""
        super().__init__(f"{field}={shown}: {rule}{tail}")


class ConfigError(InvalidInput):
    """A configuration value or key is wrong."""


class DataError(InvalidInput):
    """A data set breaks the profile format; `field` names file, row and column."""


class BundleError(QAnchorError):
    """A bundle is incomplete, altered, or made of parts of different exports."""
