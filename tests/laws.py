"""All priors and guides in small sizes, for the tests of properties that every one of them must have."""

import torch

from ltm_pyro import guides, models
from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.inference.global_latents import GlobalLatent

PRIORS = {
    "GaussianPrior": {},
    "LearnedGaussianPrior": {},
    "MixturePrior": {"components": 3, "spread": 1.0},
    "HierarchicalPrior": {"topic": 2},
    "AutoregressivePrior": {"layers": 1, "width": 8, "heads": 1},
    "FlowPrior": {"transforms": 2, "width": 8},
    "SparsePrior": {},
    "TransportPrior": {"layers": 1, "width": 8, "heads": 1},
    "ConditionalPrior": {"label": "source", "levels": ["a", "b"]},
    "GroupedPrior": {"label": "source", "levels": ["a", "b"]},
    "EnergyPrior": {"width": 8, "steps": 2, "step_size": 0.05, "contrast": 4},
    "AutoregressivePrior of mixtures": {"layers": 1, "width": 8, "heads": 1, "components": 3, "spread": 1.0},
    "FlowPrior affine": {"transforms": 2, "width": 8, "kind": "affine"},
}
GUIDES = {
    "MeanField": {},
    "LowRank": {"rank": 2},
    "BlockCovariance": {},
    "FullCovariance": {},
    "JointCovariance": {},
    "FlowGuide": {"bins": 4},
    "Point": {},
    "Laplace": {},
    "Amortized": {"layers": 1, "width": 8, "heads": 2, "window": 4},
    "Langevin": {},
}
PAIRS = [(prior, "MeanField") for prior in PRIORS] + [("HierarchicalPrior", guide) for guide in GUIDES]


def make_prior(name, shape=None):
    """A prior with perturbed parameters, so that no property holds only because a parameter is zero."""
    prior = getattr(models, name.split()[0])(shape or ThoughtShape(2, 1, 2), **PRIORS[name])
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for part in prior.modules():
            if isinstance(part, GlobalLatent):
                part.log_scale.fill_(-30.0)  # q of what is global is a point at its median
    return prior


def make_guide(name, model):
    return getattr(guides, name)(model, **GUIDES[name])
