"""The autoregressive baseline: the same decoder without thoughts (K = 0), trained beside a latent-thought model."""

from collections.abc import Mapping
from typing import Any

from ltm_pyro.studies.configure import Values

PARTS = {"model.prior": "ltm_pyro.models.GaussianPrior", "model.guide": "ltm_pyro.guides.MeanField"}


def ar_baseline(settings: Mapping[str, Any] | None = None) -> Values:
    """The recipe settings of the baseline beside a model with these settings (a recipe as it is, when not given).

    Without thoughts there is nothing to learn for a prior or a guide, so whatever the settings say of both is replaced
    by the ones that have no parameters.
    """
    kept = {key: value for key, value in (settings or {}).items() if not key.startswith(tuple(PARTS))}
    return {**kept, **PARTS, "model.decoder.init_args.thoughts": 0}
