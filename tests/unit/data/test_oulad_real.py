"""The real OULAD data set, where QANCHOR_DATA names a directory that holds it as `oulad/`."""

from pathlib import Path

import numpy as np
import pytest

from qanchor.data.adapters.oulad import import_oulad
from qanchor.data.dataset import open_dataset
from qanchor.data.render import render_profile


@pytest.fixture(scope="module")
def oulad(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set, imported and thereby validated."""
    if not (real_data / "oulad" / "events.parquet").is_file():
        pytest.skip(f"real data: no oulad/events.parquet in QANCHOR_DATA={real_data}")
    return import_oulad(real_data / "oulad", tmp_path_factory.mktemp("data") / "oulad")


def test_users_events_and_labels_are_complete(oulad: Path) -> None:
    dataset = open_dataset(oulad)
    splits = [len(dataset.user_ids(name)) for name in ("train", "valid", "test", "holdout")]
    assert splits == [14_920, 4_942, 2_529, 2_493]
    assert sum(len(profile.events) for profile in dataset.profiles(split="test")) > 350_000
    users, labels = dataset.labels("eng_dormant_30d")
    assert len(users) == 14_920 + 4_942 + 2_529
    assert labels.mean() == pytest.approx(0.130, abs=0.001)


def test_profiles_render_within_their_limits(oulad: Path) -> None:
    dataset = open_dataset(oulad)
    limits = [spec.max_events for spec in dataset.schema.modalities]
    users = dataset.user_ids("valid")[:500]
    counts = np.array(
        [render_profile(one, dataset.schema).num_events for one in dataset.profiles(users)]
    )
    assert (counts <= limits).all()
    assert (counts.sum(axis=1) >= 10).all()
    assert 40 < counts.sum(axis=1).mean() < 70
