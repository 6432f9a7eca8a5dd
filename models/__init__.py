"""p(x, z): priors over thoughts, the decoder, and the models made of them. One generative model per file."""

from ltm_pyro.models.autoregressive import AutoregressivePrior
from ltm_pyro.models.conditional import ConditionalPrior, GroupedPrior
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.denoiser import Denoiser
from ltm_pyro.models.energy import EnergyPrior
from ltm_pyro.models.flow import FlowPrior
from ltm_pyro.models.gaussian import GaussianPrior
from ltm_pyro.models.hierarchical import HierarchicalPrior
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.learned_gaussian import LearnedGaussianPrior
from ltm_pyro.models.linear_gaussian import LinearGaussianModel, TwoModesModel
from ltm_pyro.models.long_documents import PiecewiseDecoder
from ltm_pyro.models.masked_diffusion import MaskedDiffusionModel
from ltm_pyro.models.mixture import MixturePrior
from ltm_pyro.models.sparse import SparsePrior
from ltm_pyro.models.transport import TransportPrior

__all__ = [
    "AutoregressivePrior",
    "ConditionalPrior",
    "Decoder",
    "Denoiser",
    "EnergyPrior",
    "FlowPrior",
    "GaussianPrior",
    "GroupedPrior",
    "HierarchicalPrior",
    "LatentThoughtModel",
    "LearnedGaussianPrior",
    "LinearGaussianModel",
    "MaskedDiffusionModel",
    "MixturePrior",
    "PiecewiseDecoder",
    "SparsePrior",
    "TransportPrior",
    "TwoModesModel",
]
