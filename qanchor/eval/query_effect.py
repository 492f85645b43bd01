"""Whether the semantics of a query matter: how embeddings move with it, and whom it serves.

Legend: U users, Q scenarios, Z embedding_dim, B bootstrap draws.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from qanchor.eval.bootstrap import Bootstrap, interval, over_scenarios
from qanchor.eval.metrics import auc
from qanchor.eval.probe import linear_probe
from qanchor.eval.results import QueryEffect
from qanchor.eval.splits import JudgedUsers

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def query_effect(embeddings_UQZ: Floats, judged: JudgedUsers, bootstrap: Bootstrap) -> QueryEffect:
    """Measure the effect of the scenarios' own questions; `embeddings_UQZ` in their order."""
    test_UQZ = embeddings_UQZ[judged.test_rows].astype(np.float64)
    centred_UQZ = test_UQZ - test_UQZ.mean(axis=0)
    query, user, both = variance_shares(test_UQZ)
    names = tuple(judged.by_scenario)
    auc_QQ, draws_BQQ = _cross_auc(embeddings_UQZ, judged, bootstrap)
    own_Q = auc_QQ.diagonal()
    gain_Q = own_minus_others(auc_QQ)
    gain_BQ = np.stack([own_minus_others(draw) for draw in draws_BQQ])
    return QueryEffect(
        scenarios=names,
        cosine=_rows(within_user_cosine(test_UQZ)),
        centred_cosine=_rows(within_user_cosine(centred_UQZ)),
        other_user_cosine=tuple(other_user_cosine(test_UQZ).tolist()),
        variance_of_query=query,
        variance_of_user=user,
        variance_of_both=both,
        cross_auc=_rows(auc_QQ),
        num_own_best=int((own_Q >= auc_QQ.max(axis=1)).sum()),
        num_own_above_mean=int((gain_Q > 0).sum()),
        own_minus_others=float(gain_Q.mean()),
        own_minus_others_interval=interval(over_scenarios(gain_BQ)),
        own_minus_others_by_scenario=tuple(gain_Q.tolist()),
    )


def within_user_cosine(embeddings_UQZ: Doubles) -> Doubles:
    """[Q, Q]: cosine of one user's embeddings for two queries, mean over users."""
    unit_UQZ = _unit(embeddings_UQZ)
    found: Doubles = np.einsum("uqz,upz->qp", unit_UQZ, unit_UQZ, optimize=True) / len(unit_UQZ)
    return found


def other_user_cosine(embeddings_UQZ: Doubles) -> Doubles:
    """[Q]: cosine of two different users' embeddings for one query, mean over all pairs."""
    unit_UQZ = _unit(embeddings_UQZ)
    num_users = len(unit_UQZ)
    # The square of the sum holds every ordered pair, each user with itself included.
    all_pairs_Q = (unit_UQZ.sum(axis=0) ** 2).sum(axis=1)
    found: Doubles = (all_pairs_Q - num_users) / (num_users * (num_users - 1))
    return found


def variance_shares(embeddings_UQZ: Doubles) -> tuple[float, float, float]:
    """Shares of the variance explained by query alone, user alone, and only by both; sum 1."""
    centred_UQZ = embeddings_UQZ - embeddings_UQZ.mean(axis=(0, 1))
    total = float((centred_UQZ**2).sum(axis=2).mean())
    if total == 0:
        return 0.0, 0.0, 0.0
    of_query = float((centred_UQZ.mean(axis=0) ** 2).sum(axis=1).mean()) / total
    of_user = float((centred_UQZ.mean(axis=1) ** 2).sum(axis=1).mean()) / total
    return of_query, of_user, 1 - of_query - of_user


def own_minus_others(auc_QQ: Doubles) -> Doubles:
    """[Q]: AUC of a scenario with its own query minus the mean AUC with the others' queries."""
    own_Q, count = auc_QQ.diagonal(), len(auc_QQ)
    others_Q = (auc_QQ.sum(axis=1) - own_Q) / max(count - 1, 1)
    found: Doubles = own_Q - others_Q
    return found


def _cross_auc(
    embeddings_UQZ: Floats, judged: JudgedUsers, bootstrap: Bootstrap
) -> tuple[Doubles, Doubles]:
    """AUC [Q, Q] of label a with query b, and the same under each draw [B, Q, Q]."""
    names = list(judged.by_scenario)
    auc_QQ = np.empty((len(names), len(names)))
    draws_BQQ = np.empty((len(bootstrap.weights_BU), len(names), len(names)))
    with tqdm(total=len(names) ** 2, desc="probing with other queries", unit="probe") as bar:
        for row, name in enumerate(names):
            tests = []
            for column in range(len(names)):
                result = linear_probe(judged.split_data(name, embeddings_UQZ[:, column]))
                tests.append(judged.test_scores(name, result.test_scores))
                auc_QQ[row, column] = auc(tests[-1].labels, tests[-1].scores)
                bar.update()
            draws_BQQ[:, row] = bootstrap.draws(tests).auc
    return auc_QQ, draws_BQQ


def _unit(vectors_UQZ: Doubles) -> Doubles:
    norms = np.linalg.norm(vectors_UQZ, axis=-1, keepdims=True)
    found: Doubles = vectors_UQZ / np.maximum(norms, 1e-12)
    return found


def _rows(matrix: Sequence[Sequence[float]] | Doubles) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)
