"""The small wallet and toy recipe of the evaluation's tests."""

from tests.unit.eval.conftest import tiny_mini, wallet  # noqa: F401
