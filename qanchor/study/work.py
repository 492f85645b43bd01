"""One variant of a study: pre-trained, tuned where it says so, judged; what is done stays done.

A study's directory:

    triples-ID.parquet      what all variants learn from, unless given; ID: of data and options
    runs/KEY/               pre-training runs; variants that agree share one
    variants/NAME.json      a finished variant, with NAME.npz: what its probes say of the test users
    variants/NAME.scenarios.json    the tuned scenarios, where it has any
    study.json, study.md, study.html
"""

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from qanchor import config
from qanchor.bundle.scenario_file import read_scenario_file, with_replaced
from qanchor.checkpoint import Checkpoint, load_for_inference
from qanchor.config import Config
from qanchor.data.dataset import Dataset
from qanchor.errors import ConfigError
from qanchor.eval.bootstrap import TestScores
from qanchor.eval.embed import embed_corpus, encoded_corpus
from qanchor.eval.judge import Probed, probe_all
from qanchor.eval.methods import columns, question_tables
from qanchor.eval.splits import USERS_SEED, JudgedUsers
from qanchor.study.plan import Variant
from qanchor.study.runs import VariantRun, checkpoint_of, digest
from qanchor.train.corpus import RenderedCorpus
from qanchor.train.pretrain import UNTRAINED
from qanchor.tune.config import TuneConfig
from qanchor.tune.scenarios import tune


class StudyConfig(Config, frozen=True, kw_only=True):
    """How variants are tuned and judged."""

    tune: TuneConfig = TuneConfig()
    """Of variants that are tuned; the number of rows is the variant's own."""
    max_users: int = 0
    """Users per split that are judged, drawn at random (0 = all)."""
    num_draws: int = 1000
    """Bootstrap draws of the test users."""
    seed: int = 0
    """Of the draws."""


class Finished(Config, frozen=True, kw_only=True):
    """Content of `variants/NAME.json`: a variant that need not be run again."""

    key: str
    """What it followed from; another key means the file is out of date."""
    data_id: str = ""
    """Content id of data set and triples. Empty: an earlier version made the record."""
    variant: Variant
    checkpoint: str
    step: int
    num_features: int
    valid_auc: dict[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """What all variants of a study share while it runs."""

    dataset: Dataset
    settings: StudyConfig
    rendered: RenderedCorpus
    judged: JudgedUsers
    triples: Path
    study_dir: Path

    def recorded(self, variant: Variant, run: VariantRun) -> Finished | None:
        """The variant's record, if it has been run.

        Raises ConfigError for one of an earlier version, whose data cannot be told.
        """
        path = self._path(variant, ".json")
        if not path.is_file():
            return None
        found = config.load(Finished, path)
        if not found.data_id:
            rule = "holds results of an earlier version, which did not compare the data's contents"
            raise ConfigError("OUT", str(self.study_dir), rule, "choose another directory")
        # Name and words may have changed; what was measured has not.
        is_same = found.key == self._key(variant, run)
        return msgspec.structs.replace(found, variant=variant) if is_same else None

    def train(self, run: VariantRun) -> Path:
        """The run's trained checkpoint, from disk or by training it."""
        return checkpoint_of(run, self.dataset, self.triples, self.study_dir / "runs")

    def finished(self, variant: Variant, run: VariantRun) -> Finished:
        """The variant's record, from disk or by running it."""
        found = self.recorded(variant, run)
        if found is not None:
            return found
        checkpoint_path = self.train(run)
        if not variant.is_pretrained:
            checkpoint_path = checkpoint_path.parent / UNTRAINED
        checkpoint = load_for_inference(checkpoint_path)
        probed = self._probe(variant, checkpoint)
        path = self._path(variant, ".json")
        path.parent.mkdir(exist_ok=True)
        self._save_scores(variant, probed)
        record = Finished(
            key=self._key(variant, run),
            data_id=run.data_id,
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
        dataset = self.judged.narrowed(self.dataset)
        checkpoint.check_questions(dataset.scenarios)
        corpus = encoded_corpus(checkpoint, self.rendered)
        if not variant.prompt_rows:
            tables = question_tables(checkpoint, corpus, dataset)
            return probe_all(self.judged, tables, variant.name)
        out = self._path(variant, ".scenarios.json")
        out.parent.mkdir(exist_ok=True)
        # Of an earlier, unfinished try: tuning would count its versions on.
        out.unlink(missing_ok=True)
        settings = self._tuning(variant)
        tune(checkpoint, dataset, [], out, settings)
        scenarios = with_replaced(dataset.scenarios, read_scenario_file(out).scenarios)
        embeddings_UQZ = embed_corpus(checkpoint, corpus, scenarios)
        return probe_all(self.judged, columns(embeddings_UQZ), variant.name)

    def _tuning(self, variant: Variant) -> TuneConfig:
        return msgspec.structs.replace(self.settings.tune, num_prompt_rows=variant.prompt_rows)

    def _key(self, variant: Variant, run: VariantRun) -> str:
        """Content id of all that a variant's scores follow from."""
        tuning = self._tuning(variant) if variant.prompt_rows else None
        limit = self.settings.max_users
        # How users are drawn decides a result only where there is a limit.
        return digest(run.key, variant.is_pretrained, tuning, limit and (limit, USERS_SEED))

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
