"""What is made of replies that are not what was asked for."""

import json

import pytest

from qanchor.userqa.replies import read_drafts, read_pick, read_verdicts

NAMES = ("diet", "sports", "income")
DRAFT = {"topic": "diet", "query": "What does the user eat?", "answer": "Mostly noodles."}


def answers(*entries: object) -> str:
    return json.dumps({"answers": entries})


def test_names_are_taken_in_the_order_of_the_reply_and_once() -> None:
    reading = read_pick('{"topics": ["sports", "diet", "sports"]}', NAMES, 2)
    assert (list(reading.found), reading.problem) == (["sports", "diet"], "")


def test_names_too_many_are_cut_off() -> None:
    assert list(read_pick('{"topics": ["income", "diet", "sports"]}', NAMES, 1).found) == ["income"]


def test_a_small_pool_is_picked_whole() -> None:
    assert not read_pick('{"topics": ["income", "diet", "sports"]}', NAMES, 10).problem


def test_names_are_read_with_spaces_and_capitals() -> None:
    found = read_pick('{"topics": [" Meal-Times", 7, null]}', ("meal_times",), 1).found
    assert list(found) == ["meal_times"]


def test_unknown_names_are_a_problem_that_says_how_many_are_missing() -> None:
    reading = read_pick('{"topics": ["diet", "magic"]}', NAMES, 2)
    assert list(reading.found) == ["diet"]
    assert reading.problem == "1 names of the list were given, 2 are needed"


@pytest.mark.parametrize(
    "wrapped",
    [
        "```json\n{}\n```",
        "Gladly! Here it is: {} I hope it helps.",
        "<think>Is it {{or}} not?</think>\n{}",
        "\n {} ",
    ],
)
def test_json_is_found_in_its_wrapping(wrapped: str) -> None:
    text = wrapped.replace("{}", answers(DRAFT)).replace("{{or}}", "{or}")
    reading = read_drafts(text, ["diet"])
    assert reading.found["diet"].answer == "Mostly noodles."
    assert not reading.problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot help with that.",
        "{",
        "}{",
        "[]",
        '{"answers": null}',
        '{"answers": {"diet": "x"}}',
        '{"topics": "diet"}',
        answers(DRAFT)[:-20],
        '{"answers": [' * 2000,
        r'{"answers": [{"topic": "diet", "query": "\ud83d", "answer": "x"}], "topics": [1]}',
        "\x00",
    ],
)
def test_no_reply_breaks_the_reader(text: str) -> None:
    for reading in (
        read_pick(text, NAMES, 2),
        read_drafts(text, NAMES),
        read_verdicts(text, NAMES),
    ):
        assert not reading.found
        assert reading.problem


@pytest.mark.parametrize(
    "bad",
    [
        {"topic": "sports", "query": "Which?", "answer": " "},
        {"topic": "sports", "query": "Which?", "answer": 7},
        {"topic": "sports", "query": "Which?"},
        {"topic": "sports", "query": "Which?", "answer": "x" * 2000},
        {"topic": "chess", "query": "Which?", "answer": "None."},
        "sports",
        None,
    ],
)
def test_a_bad_entry_spoils_only_itself(bad: object) -> None:
    reading = read_drafts(answers(bad, DRAFT), ["diet", "sports"])
    assert list(reading.found) == ["diet"]
    assert "no usable entry for sports" in reading.problem


def test_of_two_entries_the_first_counts_and_lines_are_joined() -> None:
    first = {**DRAFT, "answer": "Noodles,\n  mostly."}
    found = read_drafts(answers(first, DRAFT), ["diet"]).found
    assert found["diet"].answer == "Noodles, mostly."


def test_revise_needs_an_answer_and_keep_needs_none() -> None:
    revise, keep = (
        {"topic": topic, "verdict": verdict}
        for topic, verdict in (("diet", "revise"), ("sports", "keep"))
    )
    reading = read_verdicts(answers(revise, keep), ["diet", "sports"])
    assert list(reading.found) == ["sports"]
    assert "corrected answer" in reading.problem


def test_a_verdict_nobody_knows_is_a_problem() -> None:
    entry = {"topic": "diet", "verdict": "maybe", "answer": ""}
    assert "maybe" in read_verdicts(answers(entry), ["diet"]).problem
