"""How much of what lies beyond a model's window its thoughts recover, between a floor and a ceiling.

Shapes: M trained models (seeds), N documents, S bootstrap samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from ltm_pyro.data.make import BEST_WITHIN
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import Records, paired
from ltm_pyro.inference.scores import Rate, rate_of

NULLS = ("shuffled", "prior")  # what R is of another text's thoughts, and of thoughts that no text was read for
BOOTSTRAP = 4_000


class Recovered(NamedTuple):
    """R of one estimator and its 95 % interval.

    ``nats_per_token`` is the model's own figure, the mean over seeds, and its standard error is over documents.
    """

    nats_per_token: float
    stderr_nats_per_token: float
    share: float
    interval: tuple[float, float]


class Ahead(NamedTuple):
    """One estimator in nats per token, and how far below the floor on the same documents, with standard errors."""

    nats_per_token: float
    stderr_nats_per_token: float
    below_floor: float
    stderr_below_floor: float


class Context(NamedTuple):
    r"""Context recovered, by estimator of the Latent-Thought model.

    .. math:: R = \frac{\mathrm{floor} - \mathrm{model}}{\mathrm{floor} - \mathrm{ceiling}}

    all in nats on the same documents. The floor is the same network with learned constants in the place of thoughts,
    the ceiling is the floor with full attention. R is 0 if thoughts carry nothing, and 1 if they carry all that full
    attention sees beyond the window. ``difference`` is floor − ceiling; where it is not above three of its standard
    errors, there is nothing to carry, or full attention has not learned it, and ``recovered`` is empty. ``ahead`` needs
    no ceiling.
    """

    floor: Rate
    ceiling: Rate
    difference: Rate
    recovered: Mapping[str, Recovered]
    ahead: Mapping[str, Ahead]

    @property
    def has_context(self) -> bool:
        """Whether full attention is ahead of the floor by more than three paired standard errors."""
        return self.difference.nats_per_token > 3 * self.difference.stderr_nats_per_token

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        rates = {"floor": self.floor, "ceiling": self.ceiling, "difference": self.difference}
        found = {name: asdict(rate) for name, rate in rates.items()}
        ahead = {name: x._asdict() for name, x in self.ahead.items()}
        return found | {"ahead": ahead, "recovered": {name: x._asdict() for name, x in self.recovered.items()}}


def context_recovered(
    models: Sequence[Records], floors: Sequence[Records], ceilings: Sequence[Records], estimators: Sequence[str]
) -> Context:
    """R of every estimator of the models, with intervals by a bootstrap over documents and over seeds.

    Args:
        models: of every seed, `DocumentScore.as_dict` of all documents.
        floors, ceilings: the same of the floors and of the ceilings, which have no latent variable: their ``bound`` is
            exact.
        estimators: of the models.

    Raises:
        UsageError: not all of them have scored the same documents.
    """
    first = floors[0]
    models, floors, ceilings = ([paired(first, x) for x in found] for found in (models, floors, ceilings))
    tokens_N = np.array([x["tokens"] for x in first], float)
    floor_MN, ceiling_MN = (_nats(found, "bound") for found in (floors, ceilings))
    nats_MN = {name: _nats(models, name) for name in estimators}

    def rate(nats_N: np.ndarray) -> Rate:
        return rate_of(torch.from_numpy(nats_N), torch.from_numpy(tokens_N))

    floor_N, ceiling_N, ahead = floor_MN.mean(0), ceiling_MN.mean(0), {}
    for name, x_MN in nats_MN.items():
        own, below = rate(x_MN.mean(0)), rate(floor_N - x_MN.mean(0))
        ahead[name] = Ahead(
            own.nats_per_token, own.stderr_nats_per_token, below.nats_per_token, below.stderr_nats_per_token
        )
    context = Context(rate(floor_N), rate(ceiling_N), rate(floor_N - ceiling_N), {}, ahead)
    if not context.has_context:
        return context
    generator = np.random.default_rng(0)
    counts_SN = generator.multinomial(len(tokens_N), np.full(len(tokens_N), 1 / len(tokens_N)), BOOTSTRAP)

    def resampled(nats_MN: np.ndarray) -> np.ndarray:
        seeds_SM = generator.multinomial(len(nats_MN), np.full(len(nats_MN), 1 / len(nats_MN)), BOOTSTRAP)
        return np.einsum("sn,mn,sm->s", counts_SN, nats_MN, seeds_SM / len(nats_MN), optimize=True)

    floor_S, ceiling_S = resampled(floor_MN), resampled(ceiling_MN)
    recovered = {}
    for name, x_MN in nats_MN.items():
        share = (floor_N - x_MN.mean(0)).sum() / (floor_N - ceiling_N).sum()
        low, high = np.quantile((floor_S - resampled(x_MN)) / (floor_S - ceiling_S), [0.025, 0.975])
        nats, stderr, *_ = ahead[name]
        recovered[name] = Recovered(nats, stderr, float(share), (float(low), float(high)))
    return context._replace(recovered=recovered)


def is_task(documents: Records, reach: int | None) -> bool:
    """Whether the optimum of every document is known, and the best within a reach: floor and ceiling without a run."""
    label = f"{BEST_WITHIN}{reach}"
    return bool(documents) and all("exact_nats" in x and label in x["labels"] for x in documents)


def known_references(documents: Records, reach: int | None) -> tuple[Records, Records]:
    """Floor and ceiling of a task's documents, both known: the best within the reach, and −log p(x)."""
    floor = [{**x, "bound_nats": x["labels"][f"{BEST_WITHIN}{reach}"]} for x in documents]
    return floor, [{**x, "bound_nats": x["exact_nats"]} for x in documents]


def _nats(found: Sequence[Records], estimator: str) -> np.ndarray:
    """(M, N), one row for each model."""
    nats_MN = np.array([[x[f"{estimator}_nats"] for x in records] for records in found], float)
    if not np.isfinite(nats_MN).all():
        raise UsageError(f"Not every document has a finite {estimator}: R would be of some documents only.")
    return nats_MN
