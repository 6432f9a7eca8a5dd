"""Discrete latents of a prior, summed out exactly: the prior runs once for each of their values.

Shapes: B sequences, M values (of several discrete sites: combinations of values).
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from ltm_pyro.errors import UsageError
from ltm_pyro.inference.latent_sites import is_local, prior_moments

LIMIT = 256  # values: the prior runs so many times at every fast step


class EnumeratedMixture(TorchDistribution):
    """Σ_m p(m) p(z | m) of M distributions of one shape, such as a prior's site has for each value of a topic.

    Args:
        components: p(z | m).
        logits_BM: log p(m), up to a constant.
    """

    arg_constraints: dict[str, Any] = {}
    is_unimodal = False

    def __init__(self, components: list[Any], logits_BM: Float[Tensor, "*B M"]) -> None:
        batch_shape = torch.broadcast_shapes(logits_BM.shape[:-1], *(x.batch_shape for x in components))
        self.components = [x if x.batch_shape == batch_shape else x.expand(batch_shape) for x in components]
        self.log_weight_BM = logits_BM.log_softmax(-1).expand(*batch_shape, -1)
        super().__init__(batch_shape, components[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the components."""
        return self.components[0].support

    @property
    def mean(self) -> Tensor:
        """Σ_m p(m) E[z | m]."""
        return self._average([x.mean for x in self.components])

    @property
    def variance(self) -> Tensor:
        """Of every coordinate."""
        return self._average([x.variance + x.mean**2 for x in self.components]) - self.mean**2

    def log_joint(self, value: Tensor) -> Float[Tensor, "*B M"]:
        """log p(m) + log p(z | m) in nats."""
        return torch.stack([x.log_prob(value) for x in self.components], -1) + self.log_weight_BM

    def log_prob(self, value: Tensor) -> Float[Tensor, "*B"]:
        """log p(z) in nats."""
        return self.log_joint(value).logsumexp(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """The value m, then z given m."""
        chosen = torch.distributions.Categorical(logits=self.log_weight_BM, validate_args=False).sample(sample_shape)
        chosen = chosen.view(*chosen.shape, *[1] * len(self.event_shape))
        z: Tensor = self.components[0].sample(sample_shape)
        for index, component in enumerate(self.components[1:], 1):
            z = torch.where(chosen == index, component.sample(sample_shape), z)
        return z

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EnumeratedMixture":
        """The same with another batch shape."""
        shape = torch.Size(batch_shape)
        return EnumeratedMixture([x.expand(shape) for x in self.components], self.log_weight_BM.expand(*shape, -1))

    def component_at(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, in unconstrained coordinates, of the component that z is most probably from."""
        index = self.log_joint(value).argmax(-1)
        pairs = [prior_moments(x) for x in self.components]
        mean, variance = pairs[0]
        for number, (one_mean, one_variance) in enumerate(pairs[1:], 1):
            here = (index == number).view(*index.shape, *[1] * (mean.dim() - len(self.batch_shape)))
            mean, variance = torch.where(here, one_mean, mean), torch.where(here, one_variance, variance)
        return mean, variance

    def _average(self, values: list[Tensor]) -> Tensor:
        weights = self.log_weight_BM.exp().unbind(-1)
        ones = [1] * len(self.event_shape)
        return torch.stack([w.reshape(*w.shape, *ones) * x for w, x in zip(weights, values, strict=True)]).sum(0)


def enumerated_sites(nodes: Mapping[str, Any]) -> dict[str, Distribution]:
    """The discrete sites of a prior's trace that are marked by ``infer={"enumerate": "parallel"}``, by name."""
    return {
        name: node["fn"]
        for name, node in nodes.items()
        if node["type"] == "sample" and is_local(node) and node["infer"].get("enumerate")
    }


class _Known(Messenger):
    """A Pyro handler: discrete sites have one value each, continuous ones the values that are known so far.

    It adds up their log-densities, and ends the run at the first site that is not known.
    """

    def __init__(self, discrete: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = {**discrete, **known}
        self.log_p: Tensor | float = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        if msg["is_observed"]:
            raise UsageError(
                f"The prior has the factor '{msg['name']}' beside discrete sites that are summed out: put what it says "
                f"into the distributions of its sites."
            )
        if msg["name"] not in self.values:
            raise _NextSiteError(msg["name"], msg["fn"], msg["infer"])
        msg["value"], msg["done"] = self.values[msg["name"]], True
        self.log_p = self.log_p + msg["fn"].log_prob(msg["value"])


class _NextSiteError(Exception):
    """The site at which a run ended."""


class _Runs(NamedTuple):
    """log p of what is known for each value m, and the next site's distributions or what the prior returned."""

    logits_BM: Float[Tensor, "*B M"]
    name: str | None
    results: list[Any]


def _run(prior: Callable[[], Tensor], values: list[dict[str, Tensor]], known: Mapping[str, Tensor]) -> _Runs:
    log_ps: list[Tensor] = []
    names: set[str | None] = set()
    results: list[Any] = []
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    for discrete in values:
        name: str | None = None
        handler = _Known(discrete, known)
        try:  # each with the same random numbers, from which a `GlobalLatent` of the prior draws its value
            with torch.random.fork_rng(devices), poutine.block(), handler:
                results.append(prior())
        except _NextSiteError as site:
            name = site.args[0]
            results.append(site.args[1])
        names.add(name)
        log_ps.append(torch.as_tensor(handler.log_p))
    if len(names) > 1:
        raise UsageError(
            f"The prior's next site is {' or '.join(sorted(map(str, names)))}, by the value of {', '.join(values[0])}: "
            f"let every value have the same sites, to be summed out."
        )
    return _Runs(torch.stack(torch.broadcast_tensors(*log_ps), -1), names.pop(), results)


def values_of(discrete: Mapping[str, Distribution]) -> list[dict[str, Tensor]]:
    """Every combination of the values of some discrete sites; `UsageError` if there are more than `LIMIT`."""
    for name, fn in discrete.items():
        if not fn.has_enumerate_support:
            raise UsageError(
                f"The prior's site '{name}' is a {type(fn).__name__}, whose values cannot be listed: sum it out by "
                f"hand, or take a distribution with finitely many values."
            )
    supports = [fn.enumerate_support(expand=False).flatten(0, len(fn.batch_shape)) for fn in discrete.values()]
    combinations = [dict(zip(discrete, each, strict=True)) for each in product(*(x.unbind(0) for x in supports))]
    if len(combinations) > LIMIT:
        raise UsageError(
            f"The prior's site {' and '.join(map(repr, discrete))} has {len(combinations):,} values, and the prior "
            f"runs once for each at every fast step: {LIMIT} are the most; take fewer, or a mixture like MixturePrior."
        )
    return combinations


def sum_out(prior: Callable[[], Tensor], values: list[dict[str, Tensor]], sample: Callable[..., Tensor]) -> Tensor:
    r"""Samples the continuous sites of a prior from their marginal density, and returns its thoughts.

    .. math:: p(u, z) = \sum_m p(m)\, p(u \mid m)\, p(z \mid u, m) =
        \Big[ \sum_m p(m)\, p(u \mid m) \Big] \Big[ \sum_m p(m \mid u)\, p(z \mid u, m) \Big]

    Every continuous site is one factor, an `EnumeratedMixture`. The prior runs M times for each, and M times more.

    Args:
        sample: `pyro.sample`, which is the model's to call.

    Raises:
        UsageError: the thoughts depend on a discrete site by more than the continuous ones.
    """
    known: dict[str, Tensor] = {}
    while True:
        runs = _run(prior, values, known)
        if runs.name is None:
            z_BLKD: Tensor = runs.results[0]
            if not all(x is z_BLKD or torch.equal(x, z_BLKD) for x in runs.results):
                raise UsageError(
                    f"The prior's thoughts depend on {', '.join(values[0])} itself, so that the decoder would have "
                    f"to run once for each of its {len(values)} values: let them depend on continuous sites alone, "
                    f"such as a Normal around what the discrete site chooses."
                )
            return z_BLKD
        known[runs.name] = sample(runs.name, EnumeratedMixture(runs.results, runs.logits_BM))


def responsibilities(
    prior: Callable[[], Tensor], values: list[dict[str, Tensor]], known: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "*B M"]]:
    """p(value | z) of every discrete site, given the values of all continuous ones."""
    posterior_BM = _run(prior, values, known).logits_BM.softmax(-1)
    found = {}
    for name in values[0]:
        kinds = torch.stack([x[name] for x in values])
        unique, number_M = kinds.unique(dim=0, return_inverse=True)
        one_hot = torch.nn.functional.one_hot(number_M, len(unique)).to(posterior_BM)
        found[name] = posterior_BM @ one_hot
    return found
