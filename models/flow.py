"""A normalising flow over all thoughts of a sequence at once; needs the extra ``flows`` (zuko)."""

from typing import Any, Literal

import pyro
import torch
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape, Z
from ltm_pyro.errors import UsageError
from ltm_pyro.models.density import ThoughtDensity
from ltm_pyro.utils.extras import extra


class FlowPrior(PyroModule):
    r"""A standard normal, mapped to the thoughts by a chain of invertible coupling layers.

    .. math:: z = f(\epsilon), \quad \epsilon \sim \mathcal{N}(0, I), \qquad
        \log p(z) = \log \mathcal{N}(f^{-1}(z); 0, I) + \log |\det \partial f^{-1} / \partial z|

    Every coupling layer transforms half of the coordinates. A network computes the transform from the other half: a
    monotone rational-quadratic spline (Durkan et al. 2019, arXiv 1906.04032), or an affine map (Dinh et al. 2017, arXiv
    1605.08803). The networks' last layers start at 0, so that f is the identity and training starts from the paper's
    prior.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        kind: ``spline``, which is the identity outside ±5, or ``affine``.
        transforms: number of coupling layers.
        width: hidden units of each coupling's network, which has two hidden layers.
    """

    def __init__(
        self, shape: ThoughtShape, kind: Literal["spline", "affine"] = "spline", transforms: int = 4, width: int = 64
    ) -> None:
        super().__init__()
        flows = extra("zuko", "flows", "FlowPrior").flows
        if shape.layers * shape.thoughts * shape.width == 0:
            raise UsageError("FlowPrior needs thoughts to transform, and the decoder has none: use GaussianPrior.")
        features = shape.layers * shape.thoughts * shape.width
        options: dict[str, Any] = {"transforms": transforms, "hidden_features": (width, width)}
        self.shape = shape
        self.flow = (flows.NSF if kind == "spline" else flows.MAF)(features, **options, passes=min(2, features))
        for module in self.flow.modules():
            if isinstance(module, nn.Sequential):
                for parameter in module[-1].parameters():
                    nn.init.zeros_(parameter)

    def forward(self) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate."""
        return pyro.sample(Z, ThoughtDensity(self))

    def log_density(self, z_BLKD: Float[Tensor, "*B L K D"]) -> Float[Tensor, "*B"]:
        """log p(z) in nats."""
        return self.flow().log_prob(z_BLKD.flatten(-3))

    def sample(self, sample_shape: torch.Size) -> Float[Tensor, "*S L K D"]:
        """z ~ p(z)."""
        return self.flow().sample(sample_shape).unflatten(-1, tuple(self.shape))
