"""q: what we believe after seeing one sequence. One family per file."""

from ltm_pyro.guides.full_covariance import FullCovariance
from ltm_pyro.guides.mean_field import MeanField

__all__ = ["FullCovariance", "MeanField"]
