"""q(z | x): variational families for the thoughts of each sequence. One family per file."""

from ltm_pyro.guides.amortized import Amortized
from ltm_pyro.guides.flow import FlowGuide
from ltm_pyro.guides.full_covariance import BlockCovariance, FullCovariance
from ltm_pyro.guides.joint_covariance import JointCovariance
from ltm_pyro.guides.langevin import Langevin
from ltm_pyro.guides.low_rank import LowRank
from ltm_pyro.guides.masking import Masking
from ltm_pyro.guides.mean_field import MeanField
from ltm_pyro.guides.point import Laplace, Point

__all__ = [
    "Amortized",
    "BlockCovariance",
    "FlowGuide",
    "FullCovariance",
    "JointCovariance",
    "Langevin",
    "Laplace",
    "LowRank",
    "Masking",
    "MeanField",
    "Point",
]
