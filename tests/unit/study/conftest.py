"""The small wallet and toy recipe of the evaluation's tests."""

from tests.unit.eval.conftest import one_sided, tiny_mini, wallet  # noqa: F401
