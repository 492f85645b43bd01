"""The profile store: what it keeps, what it refuses, what a deletion leaves."""

from pathlib import Path

import pytest

from qanchor.data.profile import Event, Profile
from qanchor.errors import InvalidInput
from qanchor_server.failures import UnknownUser
from qanchor_server.profiles import store as store_module
from qanchor_server.profiles.store import STORE_FILE, Append, ProfileStore, StoreError

WINDOW_S = 100


def open_store(path: Path) -> ProfileStore:
    return ProfileStore(path, window_s=WINDOW_S, max_events=4)


@pytest.fixture
def store(tmp_path: Path):
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def event(time_s: int, text: str = "x", value: float | None = None) -> Event:
    return Event(time_s=time_s, modality="buy", event_type="t", text=text, value=value)


def profile(user_id: str = "ada", as_of_s: int = 50, events: tuple[Event, ...] = ()) -> Profile:
    attributes = {"zip": "1010", "age": 30.5, "is_member": True}
    return Profile(user_id=user_id, as_of_s=as_of_s, events=events, attributes=attributes)


def test_a_profile_comes_back_as_it_was_also_after_reopening(tmp_path: Path) -> None:
    written = profile(events=(event(2, value=1.5), event(1)))
    first = open_store(tmp_path)
    version = first.put(written)
    first.close()
    second = open_store(tmp_path)
    stored = second.get("ada")
    second.close()
    assert stored.profile == written
    assert list(stored.profile.attributes) == ["zip", "age", "is_member"]
    assert stored.version == version


def test_versions_rise_over_put_append_and_delete(store: ProfileStore) -> None:
    versions = [store.put(profile()), store.put(profile())]
    versions.append(store.append(Append(user_id="ada", events=(event(1),)))[0])
    versions.append(store.delete("ada")[0])
    versions.append(store.put(profile()))
    assert versions == sorted(set(versions))


def test_append_moves_the_as_of_time_to_the_newest_event(store: ProfileStore) -> None:
    store.put(profile(as_of_s=50))
    store.append(Append(user_id="ada", events=(event(40),)))
    assert store.get("ada").profile.as_of_s == 50
    store.append(Append(user_id="ada", events=(event(60),)))
    assert store.get("ada").profile.as_of_s == 60
    store.append(Append(user_id="ada", events=(), as_of_s=70))
    assert store.get("ada").profile.as_of_s == 70


def test_append_refuses_an_as_of_time_that_goes_back(store: ProfileStore) -> None:
    store.put(profile(as_of_s=50))
    with pytest.raises(InvalidInput, match="as_of=49"):
        store.append(Append(user_id="ada", events=(event(1),), as_of_s=49))
    assert store.get("ada").profile.events == ()


def test_append_drops_events_that_left_the_window(store: ProfileStore) -> None:
    store.put(profile(as_of_s=50, events=(event(49), event(50))))
    store.append(Append(user_id="ada", events=(event(150),)))
    assert [kept.time_s for kept in store.get("ada").profile.events] == [50, 150]


def test_an_append_id_is_stored_once(store: ProfileStore) -> None:
    store.put(profile())
    append = Append(user_id="ada", events=(event(1),), append_id="one")
    version, was_stored = store.append(append)
    assert not was_stored
    assert store.append(append) == (version, True)
    assert len(store.get("ada").profile.events) == 1


def test_an_append_id_outlives_a_put_but_not_a_deletion(store: ProfileStore) -> None:
    append = Append(user_id="ada", events=(event(1),), append_id="one")
    store.put(profile())
    store.append(append)
    version = store.put(profile(events=(event(1),)))
    assert store.append(append) == (version, True)
    assert len(store.get("ada").profile.events) == 1
    store.delete("ada")
    store.put(profile())
    assert not store.append(append)[1]


def test_only_the_newest_append_ids_are_remembered(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_APPEND_IDS", 2)
    store.put(profile())
    for name in "abc":
        store.append(Append(user_id="ada", events=(event(1),), append_id=name))
    assert store.append(Append(user_id="ada", events=(), append_id="c"))[1]
    assert store.append(Append(user_id="ada", events=(), append_id="b"))[1]
    assert not store.append(Append(user_id="ada", events=(), append_id="a"))[1]


def test_too_many_events_are_refused_and_nothing_changes(store: ProfileStore) -> None:
    version = store.put(profile(events=(event(1),) * 3))
    with pytest.raises(InvalidInput, match="at most 4 events"):
        store.append(Append(user_id="ada", events=(event(2),) * 2))
    with pytest.raises(InvalidInput, match="at most 4 events"):
        store.put(profile(events=(event(2),) * 5))
    assert store.get("ada").version == version
    assert len(store.get("ada").profile.events) == 3


def test_an_unknown_user_cannot_be_read_or_appended_to(store: ProfileStore) -> None:
    with pytest.raises(UnknownUser, match="bob"):
        store.get("bob")
    with pytest.raises(UnknownUser, match="bob"):
        store.append(Append(user_id="bob", events=(event(1),)))


def test_nothing_of_a_deleted_user_stays_in_the_files(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put(profile("bob", events=(event(1, "kept words"),)))
    store.put(profile("ada-secret", events=(event(1, "very private words"),)))
    assert _holds(tmp_path, b"very private words")
    assert store.delete("ada-secret")[1]
    assert not store.delete("ada-secret")[1]
    store.empty_log()
    assert not _holds(tmp_path, b"very private words")
    assert not _holds(tmp_path, b"ada-secret")
    assert _holds(tmp_path, b"kept words")
    store.close()


def test_a_store_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put(profile())
    store.close()
    for call in (
        lambda: store.get("ada"),
        lambda: store.stored(["ada"]),
        lambda: store.put(profile()),
        lambda: store.append(Append(user_id="ada", events=(event(1),))),
        lambda: store.delete("ada"),
        store.empty_log,
    ):
        with pytest.raises(StoreError, match=STORE_FILE):
            call()


def test_changes_of_one_transaction_are_stored_together_or_not_at_all(store: ProfileStore) -> None:
    version = store.put(profile())

    def change() -> None:
        with store.transaction():
            store.append(Append(user_id="ada", events=(event(1),), append_id="one"))
            store.put(profile("bob"))
            store.get("eve")

    with pytest.raises(UnknownUser, match="eve"):
        change()
    assert store.stored(["ada", "bob"]) == {"ada"}
    assert store.get("ada").version == version
    assert not store.append(Append(user_id="ada", events=(), append_id="one"))[1]


def test_one_process_at_a_time_uses_a_directory(store: ProfileStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="one server at a time"):
        open_store(tmp_path)


def _holds(path: Path, words: bytes) -> bool:
    return any(words in file.read_bytes() for file in path.iterdir())
