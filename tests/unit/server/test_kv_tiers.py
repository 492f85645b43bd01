"""The tiers below the device: files that cannot be deleted stay known."""

import pytest

from qanchor_server.byte_tier import Content
from qanchor_server.kv_tiers import Forgetting, KvTiers, Move, TierBudgets, Unlink


@pytest.fixture
def tiers() -> KvTiers:
    """File 9 is ada's older one, 2 ada's, 3 bob's, 4 zoe's, for whom there is no room."""
    made = KvTiers(TierBudgets(host_bytes=640, disk_bytes=680, bytes_per_token=32))
    owners = ((9, "ada", 1.0), (2, "ada", 2.0), (3, "bob", 3.0), (4, "zoe", 0.0))
    made.adopt(
        (number, Content(user_id=user, digest=user, num_tokens=10, num_bytes=320), used_s)
        for number, user, used_s in owners
    )
    return made


def end(tiers: KvTiers, is_ok: bool) -> list[Move]:
    """End all moves that wait."""
    moves = tiers.take_moves()
    for move in moves:
        tiers.done(move, is_ok)
    return moves


def left_of(tiers: KvTiers, forgetting: Forgetting) -> set[int]:
    assert tiers.settle(forgetting)
    return forgetting.file_ids & tiers.undeleted.keys()


def test_files_left_out_at_start_are_deleted(tiers: KvTiers) -> None:
    newcomer = Content(user_id="eve", digest="eve", num_tokens=1, num_bytes=32)
    entry = tiers.disk.reserve(newcomer, now_s=4.0)
    assert entry is not None
    assert entry.place == 10
    assert end(tiers, True) == [Unlink(9, False), Unlink(4, False)]
    assert tiers.undeleted == {}


def test_a_file_that_cannot_be_deleted_is_tried_again_when_its_user_is_deleted(
    tiers: KvTiers,
) -> None:
    end(tiers, False)
    assert tiers.undeleted == {9: "ada", 4: "zoe"}
    forgetting = tiers.forget("ada")
    assert not tiers.settle(forgetting)
    assert end(tiers, False) == [Unlink(9, True), Unlink(2, True)]
    assert left_of(tiers, forgetting) == {2, 9}
    again = tiers.forget("ada")
    # Whoever asked first waits for the second try, too.
    assert not tiers.settle(forgetting)
    assert end(tiers, True) == [Unlink(9, True), Unlink(2, True)]
    assert left_of(tiers, again) == left_of(tiers, forgetting) == set()
    assert tiers.undeleted == {4: "zoe"}
    assert tiers.disk.num_failed == 4
