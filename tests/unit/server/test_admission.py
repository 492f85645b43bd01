"""Admission: limits of a request and the bound of the queue."""

import pytest

from qanchor.errors import InvalidInput
from qanchor_server.admission import Admission, check_append_id, check_user_id
from qanchor_server.failures import Overloaded, Unavailable


@pytest.fixture
def admission() -> Admission:
    opened = Admission(max_queue=4, max_queries_per_request=3)
    opened.open()
    return opened


def test_a_full_queue_refuses_and_room_is_given_back(admission: Admission) -> None:
    with admission.enter(3):
        with pytest.raises(Overloaded, match="at most 4"), admission.enter(2):
            pass
        with admission.enter(1):
            assert admission.num_queued == 4
    assert admission.num_queued == 0
    assert admission.num_overloaded == 1


def test_room_is_given_back_when_the_request_fails(admission: Admission) -> None:
    with pytest.raises(RuntimeError), admission.enter(2):
        raise RuntimeError
    assert admission.num_queued == 0


def test_an_empty_queue_takes_a_request_larger_than_the_bound() -> None:
    admission = Admission(max_queue=1, max_queries_per_request=3)
    admission.open()
    with admission.enter(3):
        assert admission.num_queued == 3


def test_the_door_is_closed_before_open_and_after_close() -> None:
    admission = Admission(max_queue=4, max_queries_per_request=3)
    with pytest.raises(Unavailable, match="starting"), admission.enter(1):
        pass
    admission.open()
    admission.close("draining")
    with pytest.raises(Unavailable, match="draining"):
        admission.check_open()


@pytest.mark.parametrize("num_queries", [0, 4])
def test_a_request_has_one_query_at_least_and_not_too_many(
    admission: Admission, num_queries: int
) -> None:
    with pytest.raises(InvalidInput) as caught:
        admission.check_num_queries(num_queries)
    assert caught.value.field == "queries"


def test_ids_have_a_length() -> None:
    check_user_id("u" * 256)
    for user_id in ("", "u" * 257):
        with pytest.raises(InvalidInput, match="user_id"):
            check_user_id(user_id)
    check_append_id("")
    with pytest.raises(InvalidInput, match="append_id"):
        check_append_id("a" * 129)
