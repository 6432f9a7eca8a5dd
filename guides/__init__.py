"""q: what we believe after seeing one sequence. One family per file."""

from ltm_pyro.guides.mean_field import MeanField

__all__ = ["MeanField"]
