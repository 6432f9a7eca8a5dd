"""p: what is random in the world. One generative story per file."""

from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.gaussian import GaussianPrior
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.linear_gaussian import LinearGaussianModel, TwoModesModel

__all__ = ["Decoder", "GaussianPrior", "LatentThoughtModel", "LinearGaussianModel", "TwoModesModel"]
