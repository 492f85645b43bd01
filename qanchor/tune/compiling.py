"""Compiled scenarios: a query text distilled into a few vectors that give its embedding.

Not in the paper. The suffix becomes k vectors and <USER_EMB> in place of text and <USER_EMB>; no
label is needed, the scenario's own embedding is the target. Of a scenario asked in several wordings
it is the direction of their mean, which hangs less on the words of any.

Legend: U users, R soft-prompt rows, S suffix length, Z embedding_dim.
"""

import logging
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from qanchor.bundle.packing import SuffixQuery
from qanchor.config import Config, Scenario
from qanchor.eval.probe import SplitData, linear_probe
from qanchor.train.corpus import IntArray
from qanchor.tune.config import CompileConfig
from qanchor.tune.fit import fit
from qanchor.tune.suffix_pass import SuffixPass, frozen, pooled_rows
from qanchor.tune.tuning import float_rows
from qanchor.tune.users import CachedUsers, LabelledRows

log = logging.getLogger(__name__)


class CompileReport(Config, frozen=True, kw_only=True):
    """How well the vectors stand for the text; all numbers are on valid users."""

    scenario: str
    num_train: int
    num_valid: int
    num_wordings: int = 1
    """Texts whose mean embedding is the target."""
    mean_cosine: float
    """Between the embeddings with text and compiled."""
    min_cosine: float
    start_cosine: float
    """Mean cosine before the first step."""
    probe_auc_text: float | None = None
    """Linear probe fitted on train users' embeddings; null without labels of two classes."""
    probe_auc_compiled: float | None = None
    suffix_tokens_text: int
    """Suffix positions of all wordings, each with its <USER_EMB>."""
    suffix_tokens_compiled: int
    suffix_tokens_saved: int
    best_step: int
    steps: int


def compile_scenario(
    passes: SuffixPass,
    scenario: Scenario,
    wordings: Sequence[SuffixQuery],
    users: CachedUsers,
    labelled: dict[str, LabelledRows] | None,
    config: CompileConfig,
) -> tuple[Scenario, CompileReport]:
    """Distil `wordings`, suffixes that ask `scenario`, into `config.num_prompt_rows` vectors.

    A tuned scenario is compiled with its soft prompt and keeps its prototypes. The scenario comes
    back one version higher.
    """
    num_tokens = sum(query.suffix_len for query in wordings)
    if num_tokens <= config.num_prompt_rows + 1:
        log.warning(
            "%s: %d vectors save nothing over %d text tokens and soft-prompt rows",
            scenario.name,
            config.num_prompt_rows,
            num_tokens - 1,
        )
    with frozen(passes.model):
        suffixes = [passes.suffix_of(query) for query in wordings]
        rows = torch.arange(len(users.cache.kv)).tolist()
        asked_UZ = [passes.all_embeddings(rows, suffix_SD) for suffix_SD in suffixes]
        target_UZ = torch.nn.functional.normalize(torch.stack(asked_UZ).mean(dim=0), dim=1)
        # Rows of the whole suffix but <USER_EMB>, so that a tuned soft prompt is taken in too.
        prompt_RD = pooled_rows(suffixes[0][:-1], config.num_prompt_rows).requires_grad_()
        no_text = suffixes[0][:0]

        def loss_of(batch: IntArray) -> Tensor:
            chosen = users.train[batch]
            found = passes.embeddings(chosen.tolist(), passes.suffix(no_text, prompt_RD))
            wanted = target_UZ[torch.from_numpy(chosen)].to(found)
            return 1 - (found * wanted).sum(dim=1).mean()

        def judge() -> float:
            return float(_cosines(passes, users.valid, prompt_RD, target_UZ).mean())

        fitted = fit(
            [prompt_RD], loss_of, judge, len(users.train), config, f"compile {scenario.name}"
        )
        cosines = _cosines(passes, users.valid, prompt_RD, target_UZ)
        compiled_SD = passes.suffix(no_text, prompt_RD.detach())
        auc_text, auc_compiled = None, None
        if labelled is not None:
            compiled_UZ = passes.all_embeddings(rows, compiled_SD)
            auc_text = _probe_auc(target_UZ, labelled)
            auc_compiled = _probe_auc(compiled_UZ, labelled)
    report = CompileReport(
        scenario=scenario.name,
        num_train=len(users.train),
        num_valid=len(users.valid),
        num_wordings=len(wordings),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        start_cosine=fitted.start_score,
        probe_auc_text=auc_text,
        probe_auc_compiled=auc_compiled,
        suffix_tokens_text=num_tokens,
        suffix_tokens_compiled=len(compiled_SD),
        suffix_tokens_saved=num_tokens - len(compiled_SD),
        best_step=fitted.best_step,
        steps=fitted.steps,
    )
    compiled = msgspec.structs.replace(
        scenario,
        version=scenario.version + 1,
        soft_prompt=float_rows(prompt_RD),
        is_compiled=True,
    )
    return compiled, report


def _cosines(passes: SuffixPass, rows: IntArray, prompt_RD: Tensor, target_UZ: Tensor) -> Tensor:
    """Cosine [len(rows)] of compiled and original embedding of each user."""
    detached = prompt_RD.detach()
    found = passes.all_embeddings(rows.tolist(), passes.suffix(detached[:0], detached))
    return (found * target_UZ[torch.from_numpy(rows)]).sum(dim=1)


def _probe_auc(embeddings_UZ: Tensor, labelled: dict[str, LabelledRows]) -> float:
    """AUC on valid of the linear probe fitted on train; test users are not looked at."""
    splits = {
        split: SplitData(embeddings_UZ[torch.from_numpy(part.rows)].numpy(), part.labels)
        for split, part in labelled.items()
    }
    return linear_probe({**splits, "test": splits["valid"]}).valid_auc
