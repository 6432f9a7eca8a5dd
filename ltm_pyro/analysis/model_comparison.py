"""Priors, guides and runs compared by the evidence of each document: differences, a winner, and stacking weights.

Shapes: N documents, M models.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.special import logsumexp, softmax

from ltm_pyro.analysis.posterior import TEXT, Posterior
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import Records, paired
from ltm_pyro.inference.pareto import TRUSTED
from ltm_pyro.utils.statistics import clustered_mean

LEVEL = 0.01  # of a winner: how often one is named between models that are equally good
STEPS = 2000  # of the weights, most of which converge in a few dozen


class Candidate(NamedTuple):
    """A model's figures, in nats per document; ``behind`` is by how much its evidence is below that of the first.

    ``evidence`` is log p(x) of a document on average, estimated by ``estimator``. ``weight`` is its stacking weight,
    ``untrusted`` the number of documents whose k-hat is above 0.7, and ``ais_gain`` what annealing finds above ``iwae``
    on average (None without it): if it is as large as the differences, draw more.
    """

    name: str
    evidence: float
    stderr: float
    nats_per_token: float
    behind: float
    behind_stderr: float
    p_value: float
    weight: float
    untrusted: int
    ais_gain: float | None


class Ranking(NamedTuple):
    """Models, the best first. ``winner`` is the first if every other is behind it beyond chance, else None."""

    candidates: tuple[Candidate, ...]
    winner: str | None
    documents: int
    estimator: str

    @property
    def doubt(self) -> str | None:
        """Where the evidence is not to be trusted, as half a sentence; None if k-hat is low everywhere."""
        bad = max(x.untrusted for x in self.candidates)
        where = f"for {bad} of {self.documents} documents under one of the models: their evidence may be too low"
        return f"k-hat is above {TRUSTED} {where}" if bad else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"candidates": [x._asdict() for x in self.candidates]}


def rank(posteriors: Mapping[str, Posterior], estimator: str | None = None) -> Ranking:
    r"""Ranks models by the evidence of the same documents, each paired with itself.

    .. math:: \bar d_m = \tfrac1N \sum_n \big[ \log p_1(x_n) - \log p_m(x_n) \big]

    Of the documents of a held-out set this is the difference of expected log predictive densities: no other document
    informs z, so that leaving one out changes nothing. Pieces of a document are independent given the model, and their
    evidence is summed. A winner is named where every other's p-value, times the number of others, is below 1 %.

    Args:
        estimator: ``ais`` or ``iwae``, both from below in expectation; by default ``ais`` if all posteriors have it.

    Raises:
        UsageError: fewer than two posteriors, other documents, or a posterior without that figure.
    """
    if len(posteriors) < 2:
        raise UsageError(f"A comparison needs at least two posteriors, got {len(posteriors)}: give another.")
    estimator = estimator or ("ais" if all("ais" in x.stats for x in posteriors.values()) else "iwae")
    records = {name: evidence_records(posterior, estimator) for name, posterior in posteriors.items()}
    first = next(iter(records.values()))
    records = {name: paired(first, found) for name, found in records.items()}
    evidence_MN = np.array([[x["evidence_nats"] for x in found] for found in records.values()])
    if not np.isfinite(evidence_MN).all():
        raise UsageError("A document has no finite evidence under one of the models: leave it out, or lower its rate.")
    weights = dict(zip(records, stacking_weights(evidence_MN.T), strict=True))
    order = (-evidence_MN.mean(1)).argsort(kind="stable")
    names, tokens = [[*records][index] for index in order], sum(x["tokens"] for x in first)
    found = []
    for name, evidence_N in zip(names, evidence_MN[order], strict=True):
        own, behind = clustered_mean(evidence_N), clustered_mean(evidence_MN[order[0]] - evidence_N)
        posterior = posteriors[name]
        gain = (posterior.stats["ais"] - posterior.stats["iwae"]).mean() if "ais" in posterior.stats else None
        found.append(
            Candidate(
                name=name,
                evidence=own.value,
                stderr=own.stderr,
                nats_per_token=-evidence_N.sum() / tokens,
                behind=behind.value,
                behind_stderr=behind.stderr,
                p_value=behind.p_value,
                weight=float(weights[name]),
                untrusted=sum(not x["pareto_k"] <= TRUSTED for x in records[name]),
                ais_gain=None if gain is None else float(gain),
            )
        )
    others = [x.p_value * (len(found) - 1) for x in found[1:]]
    return Ranking(tuple(found), names[0] if all(p < LEVEL for p in others) else None, len(first), estimator)


def evidence_records(posterior: Posterior, estimator: str = "iwae") -> Records:
    """Of every document its evidence in nats, its tokens and its largest k-hat, as the one comparer pairs them."""
    posterior.check_normalised()
    if estimator not in ("iwae", "ais", "elbo") or estimator not in posterior.stats:
        raise UsageError(
            f"This posterior has no {estimator} of its sequences: draw it with `ltm posterior --temperatures`."
        )
    names, index_N = np.unique(posterior.documents, return_inverse=True)
    tokens_N = (posterior.group(TEXT)["tokens"] >= 0).sum("token").values
    return [
        {
            "id": str(name),
            "file": "",
            "tokens": int(tokens_N[index_N == number].sum()),
            "evidence_nats": float(posterior.stats[estimator].values[index_N == number].sum()),
            "pareto_k": float(posterior.stats["pareto_k"].values[index_N == number].max()),
        }
        for number, name in enumerate(names)
    ]


def stacking_weights(evidence_NM: Float[np.ndarray, "N M"]) -> Float[np.ndarray, " M"]:
    r"""The mixture of models that predicts the documents best (Yao et al. 2018, arXiv 1704.02030).

    .. math:: \max_w \tfrac1N \sum_n \log \sum_m w_m \, p_m(x_n), \qquad w_m \ge 0, \quad \sum_m w_m = 1

    By expectation maximisation in logarithms, whose objective is concave: ArviZ exponentiates the evidence, which
    underflows for texts of a few hundred nats.
    """
    log_w_M = np.full(evidence_NM.shape[1], -math.log(evidence_NM.shape[1]))
    for _ in range(STEPS):
        share_NM = softmax(evidence_NM + log_w_M, axis=1)
        with np.errstate(divide="ignore"):  # a model that no document needs
            new_M = np.log(share_NM.mean(0))
        if np.abs(np.exp(new_M) - np.exp(log_w_M)).max() < 1e-9:
            break
        log_w_M = new_M
    return np.exp(log_w_M - logsumexp(log_w_M))


def elpd(posterior: Posterior, estimator: str = "iwae") -> Any:
    """The evidence of each document as `arviz.ELPDData`, for `arviz.compare`, which then ranks as `rank` does.

    `arviz.loo` is not offered: the likelihood at draws of q would be a harmonic mean, which ranks the fit of q.
    """
    from ltm_pyro.analysis.arviz import elpd_data

    records = evidence_records(posterior, estimator)
    each = {name: xr.DataArray([x[name] for x in records], dims="document") for name in ("evidence_nats", "pareto_k")}
    return elpd_data(each["evidence_nats"], each["pareto_k"], posterior.attrs.get("samples", 0), TRUSTED)
