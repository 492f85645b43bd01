"""OULAD from the publisher's seven CSV files, by the rules of the neutral user-event format.

1. A user is an enrolment that on day T = 75 is registered and not withdrawn, and has at least
   five (page, day) click rows in its history, days -15..74.
2. Histories hold what was known before T: no result of the course itself, no score of
   tutor-marked work handed in during the last 14 days.
3. Labels and the futures of train users, days 75..134, come from day T on.

Splits and user numbers are drawn by hashes: they are stable, but not those of other releases.
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from qanchor.data import dataset
from qanchor.data.adapters.oulad_clicks import Clicks, Sites, click_events, read_sites
from qanchor.data.adapters.oulad_labels import Outcomes, label_table
from qanchor.data.adapters.oulad_people import (
    People,
    T,
    candidates,
    make_people,
    registration_events,
    split_of_student,
    user_table,
)
from qanchor.data.adapters.oulad_rows import join_events
from qanchor.data.adapters.oulad_tables import (
    Enrolments,
    IntArray,
    Presentations,
    read_csv,
    read_enrolments,
    read_presentations,
)
from qanchor.data.adapters.oulad_work import (
    HandIns,
    Work,
    hand_in_events,
    missed_events,
    read_work,
)
from qanchor.data.writer import EVENT_SCHEMA, LABEL_SCHEMA, write_table
from qanchor.errors import DataError

FIRST_DAY = T - 90
FUTURE_DAYS = 60
MIN_CLICK_ROWS = 5


def convert_csv(source: Path, target: Path) -> None:
    """Write users, events, labels, futures and scenarios. Takes minutes and about 3 GB memory.

    Raises DataError for a file or column that is missing or cannot be read.
    """
    with tqdm(total=5, desc="oulad", unit=" steps") as bar:
        presentations = read_presentations(source)
        enrolments = read_enrolments(source, presentations)
        sites, work = read_sites(source, presentations), read_work(source, presentations)
        bar.update()
        people, clicks = _people_and_clicks(source, enrolments, presentations, sites)
        bar.update()
        hand_ins = _hand_ins(source, people, work)
        events = _events(people, clicks, sites, hand_ins, work)
        bar.update()
        future = _future(people, clicks, sites, hand_ins, work)
        bar.update()
        labels = label_table(
            Outcomes(people=people, clicks=clicks, sites=sites, hand_ins=hand_ins, work=work)
        )
        num_events = np.bincount(events["user_id"].to_numpy(), minlength=len(people))
        write_table(user_table(people, num_events), target / dataset.USERS_FILE)
        write_table(events.cast(EVENT_SCHEMA), target / dataset.EVENTS_FILE)
        write_table(future.cast(EVENT_SCHEMA), target / dataset.FUTURE_FILE)
        write_table(labels.cast(LABEL_SCHEMA), target / dataset.LABELS_FILE)
        packaged = Path(__file__).with_name("oulad_scenarios.json")
        shutil.copyfile(packaged, target / dataset.SCENARIOS_FILE)
        bar.update()


def _people_and_clicks(
    source: Path, enrolments: Enrolments, presentations: Presentations, sites: Sites
) -> tuple[People, Clicks]:
    """Keep users with enough clicks, and their clicks on all days."""
    kept = candidates(enrolments)
    sums = _summed_clicks(source, enrolments, presentations, sites, kept)
    place, day = sums["place"].to_numpy(), sums["day"].to_numpy()
    in_history = (day >= FIRST_DAY) & (day < T)
    num_rows = np.bincount(place[in_history], minlength=len(enrolments.key))
    people = make_people(kept[num_rows[kept] >= MIN_CLICK_ROWS], enrolments, presentations)
    clicks = Clicks(
        user=_user_of_enrolment(people)[place],
        site=sums["site"].to_numpy(),
        day=day,
        clicks=sums["clicks_sum"].to_numpy(),
    )
    return people, clicks.where(clicks.user >= 0)


def _summed_clicks(
    source: Path,
    enrolments: Enrolments,
    presentations: Presentations,
    sites: Sites,
    kept: IntArray,
) -> pa.Table:
    """studentVle.csv of the `kept` enrolments, summed per enrolment (place), page and day."""
    table = read_csv(source, "studentVle.csv")
    number = presentations.numbers(table, "studentVle.csv")
    place = enrolments.find(number, table["id_student"].to_numpy())
    id_site = table["id_site"].to_numpy()
    site = np.minimum(np.searchsorted(sites.id_site, id_site), len(sites.id_site) - 1)
    is_known = sites.id_site[site] == id_site
    if not is_known.all():
        row = int(np.argmin(is_known))
        rule = "must be a page of vle.csv"
        field = f"studentVle.csv, row {row}, id_site"
        raise DataError(field, int(id_site[row]), rule, "download both anew")
    keep = np.isin(place, kept)
    rows = pa.table(
        {
            "place": place[keep],
            "site": site[keep],
            "day": table["date"].to_numpy()[keep],
            "clicks": table["sum_click"].to_numpy()[keep],
        }
    )
    return rows.group_by(["place", "site", "day"]).aggregate([("clicks", "sum")])


def _user_of_enrolment(people: People) -> IntArray:
    """User by enrolment; -1 for those left out, and at index -1, which stands for none."""
    user: IntArray = np.full(len(people.enrolments.key) + 1, -1, dtype=np.int64)
    user[people.enrolment] = np.arange(len(people))
    return user


def _hand_ins(source: Path, people: People, work: Work) -> HandIns:
    """studentAssessment.csv of kept users, exams left out."""
    table = read_csv(source, "studentAssessment.csv")
    ids = table["id_assessment"].to_numpy()
    place = np.minimum(np.searchsorted(work.id_assessment, ids), len(work.id_assessment) - 1)
    is_work = work.id_assessment[place] == ids
    enrolment = people.enrolments.find(work.presentation[place], table["id_student"].to_numpy())
    user = _user_of_enrolment(people)[enrolment]
    keep = is_work & (user >= 0)
    return HandIns(
        user=user[keep],
        work=place[keep],
        day=table["date_submitted"].to_numpy()[keep],
        is_banked=table["is_banked"].to_numpy()[keep] == 1,
        score=table["score"].to_numpy()[keep],
    )


def _events(
    people: People, clicks: Clicks, sites: Sites, hand_ins: HandIns, work: Work
) -> pa.Table:
    """The histories: days -15..74."""
    last_day = T - 1
    in_history = (clicks.day >= FIRST_DAY) & (clicks.day <= last_day)
    return join_events(
        (
            click_events(clicks.where(in_history), sites),
            hand_in_events(hand_ins, work, FIRST_DAY, last_day),
            missed_events(people.presentation, hand_ins, work, FIRST_DAY, last_day),
            registration_events(people, FIRST_DAY, last_day),
        )
    )


def _future(
    people: People, clicks: Clicks, sites: Sites, hand_ins: HandIns, work: Work
) -> pa.Table:
    """What train users did on days 75..134."""
    last_day = T + FUTURE_DAYS - 1
    in_future = (clicks.day >= T) & (clicks.day <= last_day)
    table = join_events(
        (
            click_events(clicks.where(in_future), sites),
            hand_in_events(hand_ins, work, T, last_day),
            missed_events(people.presentation, hand_ins, work, T, last_day),
        )
    )
    students = people.student.tolist()
    is_train = np.array([split_of_student(student) == "train" for student in students], dtype=bool)
    return table.filter(pa.array(is_train[table["user_id"].to_numpy()]))
