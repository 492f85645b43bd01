"""Runs a study: every variant that is not finished, one after the other or several side by side.

A killed study goes on where it was: finished variants are read, a half-trained one is resumed.
"""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from qanchor.data.dataset import Dataset
from qanchor.environment import environment
from qanchor.eval.bootstrap import Bootstrap
from qanchor.eval.judge import Judged, Method, difference, judge
from qanchor.eval.splits import chosen_users, judged_users
from qanchor.study.plan import Study, Variant
from qanchor.study.results import StudyResult, VariantOutcome
from qanchor.study.runs import VariantRun, base_triples, variant_run
from qanchor.study.side_by_side import finish_side_by_side
from qanchor.study.work import Finished, StudyConfig, Work
from qanchor.train.recipes import Recipe
from qanchor.train.setup import render_users


@dataclass(frozen=True, slots=True)
class StudyInput:
    """What a study is run on."""

    study: Study
    recipe: Recipe
    dataset: Dataset
    settings: StudyConfig
    triples: Path | None = None
    """None makes the data set's own."""


def run_study(given: StudyInput, study_dir: Path, jobs: int = 1) -> StudyResult:
    """Run every variant that is not finished, `jobs` at a time, and compare them all.

    Raises ConfigError, before anything is trained, for a variant whose overrides do not fit and
    for a directory of an earlier version.
    """
    study_dir.mkdir(parents=True, exist_ok=True)
    dataset, settings = given.dataset, given.settings
    triples, data_id = base_triples(given.triples, dataset, given.recipe, study_dir)
    runs = [variant_run(one, given.recipe, dataset, data_id) for one in given.study.variants]
    users = chosen_users(dataset, settings.max_users)
    rendered = render_users(dataset, users)
    judged = judged_users(dataset, rendered.user_ids)
    work = Work(dataset, settings, rendered, judged, triples, study_dir)
    pairs = list(zip(given.study.variants, runs, strict=True))
    for pair in pairs:
        # A record that cannot be used is told now, not after the variants before it.
        work.recorded(*pair)
    done = finish_side_by_side(work, pairs, jobs) if jobs > 1 else _finish_in_turn(work, pairs)
    bootstrap = Bootstrap(len(judged.test_rows), settings.num_draws, settings.seed)
    judgements = [judge(_method(one), work.probed(one), bootstrap) for one in done]
    return StudyResult(
        title=given.study.title,
        text=given.study.text,
        dataset=dataset.name,
        num_users=len(judged.users),
        num_test=len(judged.test_rows),
        recipe=given.recipe.name,
        num_draws=settings.num_draws,
        environment=environment(),
        outcomes=tuple(
            _outcome(one, judgement, judgements[0])
            for one, judgement in zip(done, judgements, strict=True)
        ),
        curves=given.study.curves,
        skipped=judged.skipped,
    )


def _finish_in_turn(work: Work, pairs: list[tuple[Variant, VariantRun]]) -> list[Finished]:
    done = []
    bar = tqdm(pairs, desc="study", unit="variant")
    for variant, run in bar:
        bar.set_postfix_str(variant.name)
        done.append(work.finished(variant, run))
    return done


def _method(done: Finished) -> Method:
    return Method(done.variant.name, "query-conditioned", done.variant.about)


def _outcome(done: Finished, judged: Judged, base: Judged) -> VariantOutcome:
    return VariantOutcome(
        variant=done.variant,
        checkpoint=done.checkpoint,
        step=done.step,
        scores=judged.score,
        difference=None if judged is base else difference(judged, base),
    )
