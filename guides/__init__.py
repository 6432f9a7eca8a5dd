"""q: what we believe after seeing one sequence. One family per file."""

from ltm_pyro.guides.flow import FlowGuide
from ltm_pyro.guides.full_covariance import BlockCovariance, FullCovariance
from ltm_pyro.guides.low_rank import LowRank
from ltm_pyro.guides.mean_field import MeanField

__all__ = ["BlockCovariance", "FlowGuide", "FullCovariance", "LowRank", "MeanField"]
