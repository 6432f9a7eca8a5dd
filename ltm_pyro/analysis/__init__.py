"""Bayesian analysis of latent posteriors: how good q is, and what information the thoughts carry.

Needs the extra ``analysis``: ``pip install 'ltm-pyro[analysis]'``.
"""

from importlib.util import find_spec

from ltm_pyro.errors import UsageError

for package in ("arviz", "h5netcdf", "jinja2", "matplotlib", "sklearn", "xarray"):
    if find_spec(package) is None:
        raise UsageError(f"The analysis needs {package}: pip install 'ltm-pyro[analysis]'.")

from ltm_pyro.analysis.draw_posterior import DrawOptions, draw_posterior  # noqa: E402
from ltm_pyro.analysis.posterior import Posterior  # noqa: E402
from ltm_pyro.analysis.reference import ChainOptions  # noqa: E402
from ltm_pyro.analysis.texts import Text, read_texts  # noqa: E402

__all__ = ["ChainOptions", "DrawOptions", "Posterior", "Text", "draw_posterior", "read_texts"]
