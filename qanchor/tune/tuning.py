"""Cluster-based soft prompt tuning of one scenario, Q-Anchor Eq. (7).

Legend: R soft-prompt rows, K classes, D decoder width, Z embedding_dim.
"""

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qanchor.bundle.packing import SuffixQuery
from qanchor.config import Config, Scenario
from qanchor.errors import ConfigError
from qanchor.eval.metrics import auc
from qanchor.train.corpus import IntArray
from qanchor.tune.config import TuneConfig
from qanchor.tune.fit import fit
from qanchor.tune.prompt_loss import class_means, prompt_loss, prototype_scores
from qanchor.tune.suffix_pass import SuffixPass, frozen, pooled_rows
from qanchor.tune.users import LabelledRows


class TuneReport(Config, frozen=True, kw_only=True):
    """How tuning one scenario went; scores are on valid users."""

    scenario: str
    num_classes: int
    num_train: int
    num_valid: int
    judged_by: str
    """`auc` of prototype 1 against prototype 0 for two classes, `-loss` (Eq. (7)) for more."""
    untuned: float
    """Without soft prompt, prototypes at the class means."""
    start: float
    """With the soft prompt the tuning started from."""
    tuned: float
    best_step: int
    steps: int
    last_train_loss: float


def tune_scenario(
    passes: SuffixPass,
    scenario: Scenario,
    query: SuffixQuery,
    labelled: dict[str, LabelledRows],
    config: TuneConfig,
    temperature: float,
) -> tuple[Scenario, TuneReport]:
    """Learn soft prompt and prototypes of a scenario whose question has the suffix `query`.

    `labelled` as from `labelled_rows`. The scenario comes back one version higher. Raises
    ConfigError without a question, from which a soft prompt starts.
    """
    if query.suffix_len == 1:
        raise ConfigError(
            f"{scenario.name}.question",
            scenario.question,
            "gives no tokens: a model whose query_template is empty hears no question to tune",
            "tune a query-conditioned model",
        )
    train, valid = labelled["train"], labelled["valid"]
    text_ND = passes.suffix_of(query)[:-1]
    device, num_classes = text_ND.device, int(train.labels.max()) + 1
    train_labels = torch.from_numpy(train.labels).to(device)
    with frozen(passes.model):
        behind = passes.after_text(text_ND)
        no_text = text_ND[:0]
        plain_SD = behind.suffix(no_text, no_text)
        base_BZ = behind.all_embeddings(train.rows.tolist(), plain_SD).to(device)
        prototypes_KZ = class_means(base_BZ, train_labels, num_classes).requires_grad_()
        prompt_RD = pooled_rows(text_ND, config.num_prompt_rows).requires_grad_()

        def loss_of(users: IntArray) -> Tensor:
            suffix_SD = behind.suffix(no_text, prompt_RD)
            anchor_BZ = behind.embeddings(train.rows[users].tolist(), suffix_SD)
            labels_B = train_labels[torch.from_numpy(users)]
            return prompt_loss(anchor_BZ, prototypes_KZ, labels_B, temperature)

        def judge() -> float:
            suffix_SD = behind.suffix(no_text, prompt_RD)
            return _score(behind, suffix_SD, prototypes_KZ, valid, temperature)

        untuned = _score(behind, plain_SD, prototypes_KZ, valid, temperature)
        title = f"tune {scenario.name}"
        fitted = fit([prompt_RD, prototypes_KZ], loss_of, judge, len(train.rows), config, title)
    report = TuneReport(
        scenario=scenario.name,
        num_classes=num_classes,
        num_train=len(train.rows),
        num_valid=len(valid.rows),
        judged_by="auc" if num_classes == 2 else "-loss",
        untuned=untuned,
        start=fitted.start_score,
        tuned=fitted.best_score,
        best_step=fitted.best_step,
        steps=fitted.steps,
        last_train_loss=fitted.last_loss,
    )
    return _tuned(scenario, prompt_RD, prototypes_KZ), report


def _tuned(scenario: Scenario, prompt_RD: Tensor, prototypes_KZ: Tensor) -> Scenario:
    return msgspec.structs.replace(
        scenario,
        version=scenario.version + 1,
        soft_prompt=float_rows(prompt_RD),
        prototypes=float_rows(functional.normalize(prototypes_KZ, dim=-1)),
        is_compiled=False,
    )


def float_rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    """A float32 matrix as a scenario carries it."""
    return tuple(tuple(row) for row in matrix.detach().cpu().tolist())


def _score(
    passes: SuffixPass,
    suffix_SD: Tensor,
    prototypes_KZ: Tensor,
    valid: LabelledRows,
    temperature: float,
) -> float:
    anchor_BZ = passes.all_embeddings(valid.rows.tolist(), suffix_SD.detach())
    prototypes = prototypes_KZ.detach().cpu()
    if len(prototypes) == 2:
        scores_BK = prototype_scores(anchor_BZ, prototypes, temperature).numpy()
        return auc(valid.labels, (scores_BK[:, 1] - scores_BK[:, 0]).astype(np.float64))
    labels_B = torch.from_numpy(valid.labels)
    return -prompt_loss(anchor_BZ, prototypes, labels_B, temperature).item()
