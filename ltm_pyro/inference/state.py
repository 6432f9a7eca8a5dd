"""The options of local inference, and what it returns: the state to continue from, and the record of its steps.

Shapes: B sequences, b of them, N fast steps.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ltm_pyro.contracts import Init, LocalParameters
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import Draws, ElboTerms
from ltm_pyro.inference.learning_rates import cosine

Moments = dict[str, Tensor]  # running averages of one parameter's gradient, by name


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A sequence has converged if its mean ELBO over ``window`` steps grew by less than ``tolerance`` nats."""

    window: int = 8
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"The stopping rule's window must be at least 1 step, got {self.window}.")


@dataclass(frozen=True, kw_only=True)
class LocalInference:
    """How q is found (arXiv 2502.01567, algorithm 1, the inner loop).

    Args:
        steps: T_fast, fast steps per fit.
        rate: η_fast, the learning rate of the local parameters.
        optimizer: what takes the steps; ``natural`` is gradient descent in the geometry of q, for Gaussian guides.
        schedule: how the rate moves within a fit.
        start: where q begins.
        particles: draws of z per fast step, averaged.
        noise: ``fresh`` draws z anew at every step, ``antithetic`` in mirrored pairs; ``reused`` repeats one draw
            through the whole fit, as the published code does, for comparison only: its ELBO is no bound.
        kl: ``exact`` where it has a closed form, else sampled; ``path`` samples it everywhere and holds q's parameters
            fixed inside log q (sticking the landing, arXiv 1703.09194): no noise is left where q is the posterior.
        stop: drops converged sequences from the batch, at no further cost.
        slow_gradient: what the decoder follows: the ELBO at the ``last`` q, or its gradient averaged over the
            ``trajectory`` of fast steps.
        kl_weight: multiplies the KL in the objective of q and the decoder; 1 is the ELBO.
        cuda_graph: captures the fast steps as a CUDA graph at the second batch of a shape and replays it for the
            others, without Python between kernels, at the cost of keeping their memory; see
            `ltm_pyro.inference.cuda_graphs`.
        use_thoughts: False leaves z out of the decoder, as the first stage of a warm start does.
    """

    steps: int = 16
    rate: float = 0.3
    optimizer: Literal["adam", "adamw", "sgd", "natural"] = "adam"
    schedule: Literal["cosine", "constant"] = "cosine"
    init: Init = field(default_factory=Init)
    particles: int = 1
    noise: Literal["fresh", "reused", "antithetic"] = "fresh"
    kl: Literal["exact", "path"] = "exact"
    stop: Stop | None = None
    slow_gradient: Literal["last", "trajectory"] = "trajectory"
    kl_weight: float = 1.0
    cuda_graph: bool = False
    use_thoughts: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"Fast steps must not be negative, got {self.steps}: choose 0 or more.")
        if self.particles < 1:
            raise UsageError(f"Particles must be at least 1, got {self.particles}: every step needs a draw of z.")
        if self.noise == "reused" and self.stop:
            raise UsageError("Reused noise belongs to a whole batch: it cannot go with a stopping rule; remove `stop`.")
        if self.cuda_graph and (self.stop or self.noise == "reused"):
            raise UsageError(
                f"A CUDA graph has no random seed and cannot wait for converged sequences, got noise {self.noise} and "
                f"stop {self.stop}: remove them, or `cuda_graph`."
            )
        if self.noise == "antithetic" and self.particles % 2:
            raise UsageError(f"Antithetic noise needs pairs, got {self.particles} particles: choose an even number.")

    @property
    def draws(self) -> Draws:
        """How one step's ELBO is estimated."""
        particles = None if self.particles == 1 else self.particles  # one draw carries no axis through the decoder
        return Draws(particles, self.noise == "antithetic", self.kl, self.use_thoughts)

    def loss(self, terms: ElboTerms) -> Float[Tensor, ""]:
        """The objective to minimise: −Σ (log p(x | z) − kl_weight · KL), in nats."""
        return (self.kl_weight * terms.kl_B - terms.log_likelihood_B).sum()

    def factor(self, step: int) -> float:
        """The factor on the rate at a step of the schedule."""
        return cosine(step, self.steps) if self.schedule == "cosine" else 1.0


class LocalState(NamedTuple):
    """What the next fast step needs: q's parameters, the optimiser's moments and step counts, by sequence.

    ``noise`` is the random seed of reused noise.
    """

    parameters: LocalParameters
    moments: dict[str, Moments]
    steps_B: Int[Tensor, " B"]
    noise: int | None = None

    @property
    def has_parameters(self) -> bool:
        """Whether q has any number to be found; False for K = 0."""
        return any(x.numel() for x in self.parameters.values())

    def contiguous(self) -> "LocalState":
        """The same state, every tensor in dense memory of its own."""
        moments = {name: {k: x.contiguous() for k, x in m.items()} for name, m in self.moments.items()}
        return self._replace(parameters={n: x.contiguous() for n, x in self.parameters.items()}, moments=moments)

    def select(self, index_b: Int[Tensor, " b"]) -> "LocalState":
        """Some of the sequences."""
        moments = {name: {k: x[index_b] for k, x in m.items()} for name, m in self.moments.items()}
        parameters = {name: x[index_b] for name, x in self.parameters.items()}
        return self._replace(parameters=parameters, moments=moments, steps_B=self.steps_B[index_b])

    def put(self, index_b: Int[Tensor, " b"], state: "LocalState") -> "LocalState":
        """This state with some sequences' parts taken from ``state``."""

        def put(whole: Tensor, part: Tensor) -> Tensor:
            return whole.index_copy(0, index_b, part)

        moments = {name: {k: put(self.moments[name][k], x) for k, x in m.items()} for name, m in state.moments.items()}
        parameters = {name: put(self.parameters[name], x) for name, x in state.parameters.items()}
        return LocalState(parameters, moments, put(self.steps_B, state.steps_B), state.noise)


class LocalInfo(NamedTuple):
    """The record of a fit: the ELBO's terms before each fast step, in nats per sequence.

    A sequence that converged early has taken ``steps_B`` steps; its later entries are nan.
    """

    log_likelihood_NB: Float[Tensor, "N B"]
    kl_NB: Float[Tensor, "N B"]
    steps_B: Int[Tensor, " B"]

    @property
    def elbo_NB(self) -> Float[Tensor, "N B"]:
        """log p(x | z) − KL at the draws of each step."""
        return self.log_likelihood_NB - self.kl_NB

    @property
    def finite_B(self) -> Bool[Tensor, " B"]:
        """Whether every step a sequence took had a finite ELBO."""
        taken_NB = torch.arange(len(self.kl_NB), device=self.kl_NB.device)[:, None] < self.steps_B
        return (self.elbo_NB.isfinite() | ~taken_NB).all(0)
