"""Runs a study: every variant pre-trained, tuned where it says so, judged; what is done stays done.

A study's directory:

    triples.parquet         what all variants learn from, unless given
    runs/KEY/               pre-training runs; variants that agree share one
    variants/NAME.json      a finished variant, with NAME.npz: what its probes say of the test users
    variants/NAME.scenarios.json    the tuned scenarios, where it has any
    study.json, study.md, study.html

A killed study goes on where it was: finished variants are read, a half-trained one is resumed.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from tqdm import tqdm

from qanchor import config
from qanchor.bundle.scenario_file import read_scenario_file, with_replaced
from qanchor.checkpoint import Checkpoint, load_checkpoint
from qanchor.config import Config
from qanchor.data.dataset import Dataset
from qanchor.environment import environment
from qanchor.eval.bootstrap import Bootstrap, TestScores
from qanchor.eval.embed import embed_corpus, encoded_corpus
from qanchor.eval.judge import Judged, Method, Probed, difference, judge, probe_all
from qanchor.eval.methods import columns, question_tables
from qanchor.eval.splits import JudgedUsers, chosen_users, judged_users
from qanchor.study.plan import Study, Variant
from qanchor.study.results import StudyResult, VariantOutcome
from qanchor.study.runs import VariantRun, base_triples, checkpoint_of, digest, variant_run
from qanchor.train.corpus import RenderedCorpus
from qanchor.train.pretrain import UNTRAINED
from qanchor.train.recipes import Recipe
from qanchor.train.setup import render_users
from qanchor.tune.config import TuneConfig
from qanchor.tune.scenarios import tune

log = logging.getLogger(__name__)


class StudyConfig(Config, frozen=True, kw_only=True):
    """How variants are tuned and judged."""

    tune: TuneConfig = TuneConfig()
    """Of variants that are tuned; the number of rows is the variant's own."""
    max_users: int = 0
    """Users per split that are judged (0 = all)."""
    num_draws: int = 1000
    """Bootstrap draws of the test users."""
    seed: int = 0
    """Of the draws."""


class Finished(Config, frozen=True, kw_only=True):
    """Content of `variants/NAME.json`: a variant that need not be run again."""

    key: str
    """What it followed from; another key means the file is out of date."""
    variant: Variant
    checkpoint: str
    step: int
    num_features: int
    valid_auc: dict[str, float]


@dataclass(frozen=True, slots=True)
class StudyInput:
    """What a study is run on."""

    study: Study
    recipe: Recipe
    dataset: Dataset
    settings: StudyConfig
    triples: Path | None = None
    """None makes the data set's own."""


def run_study(given: StudyInput, study_dir: Path) -> StudyResult:
    """Run every variant that is not finished and compare them all.

    Raises ConfigError for a variant whose overrides do not fit, before anything is trained.
    """
    study_dir.mkdir(parents=True, exist_ok=True)
    dataset, settings = given.dataset, given.settings
    triples = base_triples(given.triples, dataset, given.recipe, study_dir)
    runs = [variant_run(one, given.recipe, dataset, triples) for one in given.study.variants]
    users = chosen_users(dataset, settings.max_users)
    rendered = render_users(dataset, users)
    judged = judged_users(dataset, rendered.user_ids)
    work = _Work(dataset, settings, rendered, judged, study_dir)
    bar = tqdm(list(zip(given.study.variants, runs, strict=True)), desc="study", unit="variant")
    done = []
    for variant, run in bar:
        bar.set_postfix_str(variant.name)
        done.append(work.finished(variant, run, triples))
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
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """What all variants of a study share while it runs."""

    dataset: Dataset
    settings: StudyConfig
    rendered: RenderedCorpus
    judged: JudgedUsers
    study_dir: Path

    def finished(self, variant: Variant, run: VariantRun, triples: Path) -> Finished:
        """The variant's record, from disk or by running it."""
        key = self._key(variant, run)
        path = self._path(variant, ".json")
        if path.is_file():
            found = config.load(Finished, path)
            if found.key == key:
                # Name and words may have changed; what was measured has not.
                return msgspec.structs.replace(found, variant=variant)
        checkpoint_path = checkpoint_of(run, self.dataset, triples, self.study_dir / "runs")
        if not variant.is_pretrained:
            checkpoint_path = checkpoint_path.parent / UNTRAINED
        checkpoint = load_checkpoint(checkpoint_path)
        checkpoint.model.to("cuda" if torch.cuda.is_available() else "cpu")
        probed = self._probe(variant, checkpoint)
        path.parent.mkdir(exist_ok=True)
        self._save_scores(variant, probed)
        record = Finished(
            key=key,
            variant=variant,
            checkpoint=checkpoint_path.relative_to(self.study_dir).as_posix(),
            step=checkpoint.meta.step,
            num_features=probed.num_features,
            valid_auc=dict(probed.valid_auc),
        )
        # Last and in one step: a record means that all of it is there.
        staging = path.with_suffix(".partial")
        config.save(record, staging)
        staging.replace(path)
        return record

    def probed(self, done: Finished) -> Probed:
        """What a finished variant's probes say."""
        with np.load(self._path(done.variant, ".npz")) as arrays:
            tests = {
                name: TestScores(
                    arrays[f"rows:{name}"], arrays[f"labels:{name}"], arrays[f"scores:{name}"]
                )
                for name in self.judged.by_scenario
            }
        return Probed(tests, done.valid_auc, done.num_features)

    def _probe(self, variant: Variant, checkpoint: Checkpoint) -> Probed:
        corpus = encoded_corpus(checkpoint, self.rendered)
        if not variant.prompt_rows:
            tables = question_tables(checkpoint, corpus, self.dataset)
            return probe_all(self.judged, tables, variant.name)
        out = self._path(variant, ".scenarios.json")
        out.parent.mkdir(exist_ok=True)
        # Of an earlier, unfinished try: tuning would count its versions on.
        out.unlink(missing_ok=True)
        settings = self._tuning(variant)
        tune(checkpoint, self.dataset, [], out, settings)
        scenarios = with_replaced(self.dataset.scenarios, read_scenario_file(out).scenarios)
        embeddings_UQZ = embed_corpus(checkpoint, corpus, scenarios)
        return probe_all(self.judged, columns(embeddings_UQZ), variant.name)

    def _tuning(self, variant: Variant) -> TuneConfig:
        return msgspec.structs.replace(self.settings.tune, num_prompt_rows=variant.prompt_rows)

    def _key(self, variant: Variant, run: VariantRun) -> str:
        """Content id of all that a variant's scores follow from."""
        tuning = self._tuning(variant) if variant.prompt_rows else None
        return digest(run.key, variant.is_pretrained, tuning, self.settings.max_users)

    def _save_scores(self, variant: Variant, probed: Probed) -> None:
        arrays: dict[str, np.ndarray] = {}
        for name, test in probed.tests.items():
            arrays[f"rows:{name}"] = test.rows
            arrays[f"labels:{name}"] = test.labels
            arrays[f"scores:{name}"] = test.scores
        np.savez_compressed(self._path(variant, ".npz"), **arrays)  # type: ignore[arg-type]

    def _path(self, variant: Variant, ending: str) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "-", variant.name.lower()).strip("-")
        return self.study_dir / "variants" / f"{slug}{ending}"


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
