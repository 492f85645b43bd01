"""OULAD from CSV: a small data set whose every event and label is derived by hand.

Presentation AAA/2013J starts on 2013-10-05 and BBB/2014B on 2014-02-01, 119 days later. Six
students take AAA; each is known by an invented region, since users.parquet has no student
numbers. Who is kept: anna, bert and cleo; dora left on day 50, emil on an unknown day, and finn
has four click rows only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qanchor.data.adapters.oulad import CSV_FILES, import_oulad
from qanchor.data.adapters.oulad_clicks import Clicks, click_events, read_sites
from qanchor.data.adapters.oulad_people import split_of_student
from qanchor.data.adapters.oulad_tables import read_presentations
from qanchor.data.dataset import open_dataset
from qanchor.errors import DataError

STUDENTS = [number for number in range(1, 60) if split_of_student(number) == "train"][:6]
ANNA, BERT, CLEO, DORA, EMIL, FINN = STUDENTS
HOLDOUT = next(n for n in range(1, 200) if split_of_student(n) == "holdout")
AAA, BBB = "AAA,2013J", "BBB,2014B"

INFO = "gender,region,highest_education,imd_band,age_band,num_of_prev_attempts,studied_credits"
TABLES = {
    "courses.csv": [
        "code_module,code_presentation,module_presentation_length",
        f"{AAA},268",
        f"{BBB},234",
    ],
    "vle.csv": [
        "id_site,code_module,code_presentation,activity_type,week_from,week_to",
        f"101,{AAA},homepage,?,?",
        f"105,{AAA},oucontent,1,2",
        f"103,{AAA},oucontent,3,3",
        f"102,{AAA},forumng,,",
        f"104,{AAA},ouelluminate,,",
        f"201,{BBB},homepage,,",
    ],
    "assessments.csv": [
        "code_module,code_presentation,id_assessment,assessment_type,date,weight",
        f"{AAA},11,TMA,20,10",
        f"{AAA},12,TMA,65,0",
        f"{AAA},13,TMA,100,12.5",
        f"{AAA},14,CMA,50,5",
        f"{AAA},15,Exam,,100",
    ],
    "studentInfo.csv": [
        f"code_module,code_presentation,id_student,{INFO},disability,final_result",
        f"{AAA},{ANNA},F,anna,HE Qualification,10-20,0-35,0,60,N,Pass",
        f"{AAA},{BERT},M,bert,A Level or Equivalent,?,35-55,1,120,Y,Fail",
        f"{AAA},{CLEO},M,cleo,A Level or Equivalent,,0-35,0,60,N,Withdrawn",
        f"{AAA},{DORA},F,dora,A Level or Equivalent,,0-35,0,60,N,Withdrawn",
        f"{AAA},{EMIL},M,emil,A Level or Equivalent,,0-35,0,60,N,Withdrawn",
        f"{AAA},{FINN},M,finn,A Level or Equivalent,,0-35,0,60,N,Pass",
        f"{BBB},{BERT},M,bert,A Level or Equivalent,?,35-55,1,60,Y,Withdrawn",
        f"{BBB},{CLEO},M,cleo,A Level or Equivalent,,0-35,0,60,N,Pass",
    ],
    "studentRegistration.csv": [
        "code_module,code_presentation,id_student,date_registration,date_unregistration",
        f"{AAA},{ANNA},-20,",
        f"{AAA},{BERT},-3,",
        f"{AAA},{CLEO},1,90",
        f"{AAA},{DORA},-20,50",
        f"{AAA},{EMIL},-20,?",
        f"{AAA},{FINN},-20,",
        f"{BBB},{BERT},-50,-46",
        f"{BBB},{CLEO},-10,",
    ],
    "studentAssessment.csv": [
        "id_assessment,id_student,date_submitted,is_banked,score",
        f"11,{ANNA},19,0,81",
        f"12,{ANNA},65,0,70",
        f"14,{ANNA},52,0,100",
        f"15,{ANNA},230,0,55",
        f"13,{ANNA},107,0,60",
        f"11,{BERT},-1,1,66",
        f"12,{BERT},60,0,?",
        f"14,{BERT},10,0,?",
        f"13,{BERT},108,0,40",
        f"11,{CLEO},20,0,49.5",
    ],
}

Click = tuple[int, int, int, int]
CLICKS: list[Click] = [
    # anna: days -16 (too early for the history), 1, 2, 70, then 75, 80, 90, 134 and 135.
    *((ANNA, 101, day, 1) for day in (-16, 1, 70, 75, 135)),
    *((ANNA, 102, day, 2) for day in (75, 80, 90)),
    (ANNA, 103, 2, 7),
    (ANNA, 103, 2, 8),
    (ANNA, 105, 2, 1),
    (ANNA, 105, 134, 200),
    (ANNA, 104, 74, 3),
    (ANNA, 102, 74, 1),
    # bert: active on days 50..54, then once on day 104, in a live session.
    *((BERT, 101, day, 1) for day in range(50, 55)),
    (BERT, 104, 104, 1),
    # cleo: active until day 60, then never again.
    *((CLEO, 101, day, 1) for day in range(56, 61)),
    *((DORA, 101, day, 1) for day in range(1, 20)),
    *((EMIL, 101, day, 1) for day in range(1, 20)),
    # finn: six rows, but two days are split over two rows.
    *((FINN, 101, day, 1) for day in (1, 1, 2, 2, 3, 4)),
]

WriteCsv = Callable[..., Path]


@pytest.fixture
def write_csv(tmp_path: Path) -> WriteCsv:
    """Writes the seven files; keyword arguments replace one by its stem: vle=[...]."""

    def write(**changes: list[str]) -> Path:
        source = tmp_path / "csv"
        source.mkdir()
        clicks = [f"{AAA},{student},{site},{day},{n}" for student, site, day, n in CLICKS]
        head = "code_module,code_presentation,id_student,id_site,date,sum_click"
        for file, lines in {**TABLES, "studentVle.csv": [head, *clicks]}.items():
            lines = changes.get(file.removesuffix(".csv"), lines)
            (source / file).write_text("\n".join(lines) + "\n")
        return source

    return write


@pytest.fixture
def imported(write_csv: WriteCsv, tmp_path: Path) -> Path:
    """The imported data set."""
    return import_oulad(write_csv(), tmp_path / "oulad")


def _names(path: Path) -> dict[int, str]:
    users = pq.read_table(path / "users.parquet")
    return dict(zip(users["user_id"].to_pylist(), users["region"].to_pylist(), strict=True))


def _events(path: Path, file: str, name: str) -> list[tuple[int, str, float | None]]:
    names = _names(path)
    rows = pq.read_table(path / file).to_pylist()
    return [
        (row["day"], row["text"], row["value"]) for row in rows if names[row["user_id"]] == name
    ]


def _labels(path: Path, name: str) -> dict[str, int]:
    names = _names(path)
    rows = pq.read_table(path / "labels.parquet").to_pylist()
    return {row["scenario"]: row["label"] for row in rows if names[row["user_id"]] == name}


def test_only_users_the_rules_admit_are_kept(imported: Path) -> None:
    assert sorted(_names(imported).values()) == ["anna", "bert", "cleo"]


def test_annas_history_is_told_in_words(imported: Path) -> None:
    assert _events(imported, "events.parquet", "anna") == [
        (1, "opened the course homepage, 1 click", 1.0),
        (2, "studied learning unit 1 (planned for week 3), 11-15 clicks", 15.0),
        (2, "studied learning unit 2 (planned for weeks 1-2), 1 click", 1.0),
        (
            19,
            "submitted tutor-marked assignment 1 (10% of the grade) 1 day before the deadline, "
            "score 81",
            81.0,
        ),
        (51, "missed the deadline of computer-marked test 1 (5% of the grade)", None),
        (
            52,
            "submitted computer-marked test 1 (5% of the grade) 2 days late, score 100",
            100.0,
        ),
        # Day 65 is within 14 days of T: the score is not known yet. No weight, no percentage.
        (65, "submitted tutor-marked assignment 2 on the deadline day, not marked yet", None),
        (70, "opened the course homepage, 1 click", 1.0),
        (74, "visited discussion forum 1, 1 click", 1.0),
        (74, "joined live session room 1, 3 clicks", 3.0),
    ]


def test_berts_history_has_carried_over_work_and_another_course(imported: Path) -> None:
    texts = [(day, text) for day, text, _ in _events(imported, "events.parquet", "bert")]
    home = "opened the course homepage, 1 click"
    course = "another course (module BBB, Social Sciences, presentation 2014B)"
    assert texts == [
        (-3, "registered for this course 3 days before it starts"),
        (
            -1,
            "carried over an earlier result for tutor-marked assignment 1 (10% of the grade), "
            "score 66",
        ),
        (
            10,
            "submitted computer-marked test 1 (5% of the grade) 40 days before the deadline, "
            "not marked yet",
        ),
        *((day, home) for day in range(50, 55)),
        (60, "submitted tutor-marked assignment 2 5 days before the deadline, not marked yet"),
        # Day -50 and -46 of BBB are days 69 and 73 of AAA.
        (69, f"registered for {course}"),
        (73, f"withdrew from {course}"),
    ]


def test_scores_and_registrations_are_told_exactly(imported: Path) -> None:
    texts = [text for _, text, _ in _events(imported, "events.parquet", "cleo")]
    assert "registered for this course 1 day after it started" in texts
    assert any(text.endswith("on the deadline day, score 49.5") for text in texts)
    assert "missed the deadline of tutor-marked assignment 2" in texts


def test_futures_hold_days_75_to_134(imported: Path) -> None:
    assert _events(imported, "future_events_train.parquet", "anna") == [
        (75, "opened the course homepage, 1 click", 1.0),
        (75, "visited discussion forum 1, 2 clicks", 2.0),
        (80, "visited discussion forum 1, 2 clicks", 2.0),
        (90, "visited discussion forum 1, 2 clicks", 2.0),
        (101, "missed the deadline of tutor-marked assignment 3 (12.5% of the grade)", None),
        (
            107,
            "submitted tutor-marked assignment 3 (12.5% of the grade) 7 days late, score 60",
            60.0,
        ),
        (134, "studied learning unit 2 (planned for weeks 1-2), more than 100 clicks", 200.0),
    ]


def test_attributes_are_those_of_the_publisher_in_words(imported: Path) -> None:
    rows = {row["region"]: row for row in pq.read_table(imported / "users.parquet").to_pylist()}
    bert = {key: value for key, value in rows["bert"].items() if key != "user_id"}
    assert bert == {
        "split": "train",
        "asof_day": 75,
        "asof_date_approx": "2013-12-19",
        "module": "AAA",
        "presentation": "2013J",
        "module_domain": "Social Sciences",
        "start_month": "October",
        "course_length_days": 268,
        "gender": "male",
        "age_band": "35-55",
        "region": "bert",
        "highest_education": "A Level or Equivalent",
        "deprivation_band": None,
        "disability": True,
        "previous_attempts": 1,
        "credits_studied": 120,
        "registration_day": -3.0,
        "other_courses_now": 0,
        "earlier_courses_passed": 0,
        "earlier_courses_not_passed": 0,
        "n_events": 11,
    }
    assert rows["anna"]["deprivation_band"] == "10-20"
    assert rows["anna"]["disability"] is False


def test_labels_follow_their_definitions(imported: Path) -> None:
    """Active days in [75, 105): anna 3, bert 1, cleo 0; the 75th percentile of those is 2.

    New pages: only bert's live session room is one; the 70th percentile of (0, 1, 0) is 0.4.
    Days in [45, 75): bert 5, cleo 5, anna 2 (too few for a drop). Assignment 3 is due on day 100:
    anna hands in 7 days late, bert 8, cleo never. For bert BBB is registered before T.
    """
    common = {"mkt_live_session_30d": 0, "mkt_explore_30d": 0, "eng_heavy_30d": 0}
    assert _labels(imported, "anna") == {
        **common,
        "eng_dormant_30d": 0,
        "eng_heavy_30d": 1,
        "eng_forum_30d": 1,
        "risk_withdraw": 0,
        "risk_fail": 0,
        "risk_missed_deadline_60d": 0,
        "mkt_reenrol_365d": 0,
    }
    assert _labels(imported, "bert") == {
        **common,
        "eng_dormant_30d": 0,
        "eng_drop_30d": 1,
        "eng_forum_30d": 0,
        "risk_withdraw": 0,
        "risk_fail": 1,
        "risk_missed_deadline_60d": 1,
        "mkt_live_session_30d": 1,
        "mkt_explore_30d": 1,
    }
    assert _labels(imported, "cleo") == {
        **common,
        "eng_dormant_30d": 1,
        "eng_drop_30d": 1,
        "eng_forum_30d": 0,
        "risk_withdraw": 1,
        "risk_missed_deadline_60d": 1,
        "mkt_reenrol_365d": 1,
    }


def test_the_result_opens_with_the_oulad_schema(imported: Path) -> None:
    dataset = open_dataset(imported)
    assert dataset.name == "oulad"
    names = [spec.name for spec in dataset.schema.modalities]
    assert names == [
        "navigation",
        "content",
        "social",
        "quiz",
        "assessment",
        "registration",
        "tabular",
    ]
    assert len(dataset.scenarios) == 10
    assert "CC BY 4.0" in dataset.config.note


def test_holdout_users_have_a_history_and_no_labels(write_csv: WriteCsv, tmp_path: Path) -> None:
    def renamed(lines: list[str]) -> list[str]:
        return [line.replace(f"{AAA},{ANNA},", f"{AAA},{HOLDOUT},") for line in lines]

    head = "code_module,code_presentation,id_student,id_site,date,sum_click"
    clicks = [f"{AAA},{student},{site},{day},{n}" for student, site, day, n in CLICKS]
    source = write_csv(
        studentInfo=renamed(TABLES["studentInfo.csv"]),
        studentRegistration=renamed(TABLES["studentRegistration.csv"]),
        studentVle=renamed([head, *clicks]),
    )
    path = import_oulad(source, tmp_path / "oulad")
    assert _events(path, "events.parquet", "anna")
    assert _labels(path, "anna") == {}
    assert _events(path, "future_events_train.parquet", "anna") == []


@pytest.mark.parametrize("file", sorted(CSV_FILES))
def test_a_missing_file_is_named(write_csv: WriteCsv, tmp_path: Path, file: str) -> None:
    source = write_csv()
    (source / file).unlink()
    with pytest.raises(DataError, match=f"{file}.*file missing"):
        import_oulad(source, tmp_path / "oulad")


def test_a_missing_column_and_an_unknown_key_are_named(write_csv: WriteCsv, tmp_path: Path) -> None:
    source = write_csv(courses=["code_module,code_presentation", AAA])
    with pytest.raises(DataError, match=r"courses\.csv.*module_presentation_length"):
        import_oulad(source, tmp_path / "one")
    (source / "courses.csv").write_text("\n".join(TABLES["courses.csv"][:2]) + "\n")
    with pytest.raises(DataError, match=r"studentInfo\.csv, row 6=.*BBB.*presentation of courses"):
        import_oulad(source, tmp_path / "two")


def test_a_click_on_an_unknown_page_is_named(write_csv: WriteCsv, tmp_path: Path) -> None:
    source = write_csv(vle=TABLES["vle.csv"][:-2])
    with pytest.raises(DataError, match=r"studentVle\.csv, row \d+, id_site=104"):
        import_oulad(source, tmp_path / "oulad")


def test_click_counts_are_told_in_ranges(write_csv: WriteCsv) -> None:
    source = write_csv()
    sites = read_sites(source, read_presentations(source))
    counts = [1, 2, 10, 11, 15, 16, 20, 21, 30, 31, 50, 51, 100, 101, 6977]
    zeros = pa.array([0] * len(counts)).to_numpy()
    clicks = Clicks(user=zeros, site=zeros, day=zeros, clicks=pa.array(counts).to_numpy())
    texts: list[Any] = click_events(clicks, sites)["text"].to_pylist()
    assert [text.removeprefix("opened the course homepage, ") for text in texts] == [
        "1 click",
        "2 clicks",
        "10 clicks",
        *["11-15 clicks"] * 2,
        *["16-20 clicks"] * 2,
        *["21-30 clicks"] * 2,
        *["31-50 clicks"] * 2,
        *["51-100 clicks"] * 2,
        *["more than 100 clicks"] * 2,
    ]
