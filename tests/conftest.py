"""Fixtures and settings shared by all tests; what is missing is named in the skip reason."""

import os
from pathlib import Path

import pytest

# Before torch is imported: tiny models gain nothing from threads, and on a busy machine two
# waiting thread pools slow each other down thirtyfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real data sets, from QANCHOR_DATA."""
    directory = os.environ.get("QANCHOR_DATA")
    if not directory:
        pytest.skip("real data: set QANCHOR_DATA to a directory that holds oulad/")
    if not Path(directory).is_dir():
        # A misspelt path must not pass for "no data here".
        pytest.fail(f"QANCHOR_DATA={directory!r} is no directory")
    return Path(directory)
