"""Fixtures and skips shared by all tests; what is missing is named in the skip reason."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real data sets, from QANCHOR_DATA."""
    directory = os.environ.get("QANCHOR_DATA")
    if not directory:
        pytest.skip("QANCHOR_DATA names no directory of real data sets")
    return Path(directory)
