"""Thoughts that depend on a label of the document, such as its source. Shapes: G groups, the values of the label."""

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape, Z
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.covariates import UNKNOWN
from ltm_pyro.inference.global_latents import GlobalLatent

UNKNOWN_LEVEL = torch.tensor(UNKNOWN)


def check_levels(name: str, label: str, levels: Sequence[Any]) -> None:
    """Raises `UsageError` unless a prior has at least one value of its label, and none twice."""
    if not levels or len({*levels}) < len(levels):
        raise UsageError(
            f"{name} needs the different values of the label '{label}' as `levels`, got {[*levels]}: list each once."
        )


class ConditionalPrior(PyroModule):
    r"""A normal of its own for every value of a label: p(z | source).

    .. math:: p(z \mid g) = \prod_{l,k,d} \mathcal{N}(z_{lkd}; m_{glkd}, s_{glkd}^2)

    A document whose label is missing, or has a value that is not among the levels, has the normal with mean and
    variance of the equal mixture of all levels. Parameters: ``mean_GLKD`` is m and starts at 0, ``log_scale_GLKD`` is
    log s and starts at 0. Groups share nothing: see `GroupedPrior` where some have few documents.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        label: its name in the packed data (``ltm data pack --label``).
        levels: the values that it has.
    """

    def __init__(self, shape: ThoughtShape, label: str, levels: list[str | int]) -> None:
        super().__init__()
        check_levels("ConditionalPrior", label, levels)
        self.covariates, self.levels = (label,), {label: levels}
        self.mean_GLKD = nn.Parameter(torch.zeros(len(levels), *shape))
        self.log_scale_GLKD = nn.Parameter(torch.zeros(len(levels), *shape))

    def forward(self, **labels: Int[Tensor, " B"]) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate, given the number of each sequence's level."""
        level_B = labels.get(self.covariates[0], UNKNOWN_LEVEL)
        mean_GLKD, variance_GLKD = self.mean_GLKD, (2 * self.log_scale_GLKD).exp()
        mean_LKD = mean_GLKD.mean(0)
        variance_LKD = (variance_GLKD + mean_GLKD**2).mean(0) - mean_LKD**2
        mean_BLKD = torch.cat([mean_LKD[None], mean_GLKD])[level_B]
        variance_BLKD = torch.cat([variance_LKD[None], variance_GLKD])[level_B]
        return pyro.sample(Z, dist.Normal(mean_BLKD, variance_BLKD.sqrt()).to_event(3))


class GroupedPrior(PyroModule):
    r"""Partial pooling: the mean of each group is a random variable too, around a mean of all groups.

    .. math::
        m_g = \mu + \tau\, e_g, \qquad p(e_g) = \mathcal{N}(0, I), \qquad p(z \mid g) = \mathcal{N}(z; m_g, s^2)

    e is a `GlobalLatent` with a normal posterior of its own, which the slow step learns: a group with many documents
    has its own mean, one with few is drawn towards μ (shrinkage). μ, log τ and log s are learned, each (L, K, D), and
    start at 0. A document whose group is missing or not among the levels is one of a new group: N(μ, τ² + s²). Source:
    random effects, Gelman & Hill 2007, chapter 12; the non-centred form, Papaspiliopoulos et al. 2007.

    Args:
        shape: (L, K, D) of one sequence's thoughts.
        label: the group's name in the packed data (``ltm data pack --label``).
        levels: the groups.
    """

    def __init__(self, shape: ThoughtShape, label: str, levels: list[str | int]) -> None:
        super().__init__()
        check_levels("GroupedPrior", label, levels)
        self.covariates, self.levels = (label,), {label: levels}
        zeros_GLKD = torch.zeros(len(levels), *shape)
        self.mean_LKD = nn.Parameter(torch.zeros(*shape))
        self.log_tau_LKD = nn.Parameter(torch.zeros(*shape))
        self.log_scale_LKD = nn.Parameter(torch.zeros(*shape))
        self.effect = GlobalLatent(
            "z_effect", dist.Normal, zeros_GLKD, torch.ones_like(zeros_GLKD), init=zeros_GLKD, scale=0.5
        )

    def forward(self, **labels: Int[Tensor, " B"]) -> Float[Tensor, "... L K D"]:
        """Samples the site ``z`` inside the surrounding plate, given the number of each sequence's group."""
        group_B = labels.get(self.covariates[0], UNKNOWN_LEVEL)
        tau_LKD = self.log_tau_LKD.exp()
        mean_GLKD = self.mean_LKD + tau_LKD * self.effect()
        variance_LKD = (2 * self.log_scale_LKD).exp()
        mean_BLKD = torch.cat([self.mean_LKD[None], mean_GLKD])[group_B]
        is_new_B111 = (group_B == 0)[..., None, None, None]
        return pyro.sample(Z, dist.Normal(mean_BLKD, (variance_LKD + is_new_B111 * tau_LKD**2).sqrt()).to_event(3))

    @torch.no_grad()
    def group_means(self) -> tuple[Float[Tensor, "G L K D"], Float[Tensor, "G L K D"]]:
        """Mean and standard deviation of each m_g under its posterior, at the learned μ and τ."""
        tau_LKD = self.log_tau_LKD.exp()
        return self.mean_LKD + tau_LKD * self.effect.loc, tau_LKD * self.effect.log_scale.exp()

    @torch.no_grad()
    def shrinkage(self) -> Float[Tensor, " G"]:
        """How much of a group's mean is borrowed from the others, by group: 1 is all, as of a group without documents.

        The posterior variance of e_g over its prior's, which is 1, averaged over the coordinates.
        """
        return (2 * self.effect.log_scale).exp().flatten(1).mean(1).clamp(max=1.0)
