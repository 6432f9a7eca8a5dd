"""The options of local inference, and its results: the state to continue from, and the ELBO at every step.

Shapes: B sequences, b of them selected, N fast steps.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ltm_pyro.contracts import Init, LocalParameters
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import Draws, ElboTerms
from ltm_pyro.inference.learning_rates import cosine
from ltm_pyro.inference.row_noise import RowKeys, RowNoise

MOST = 10**6  # fast steps or particles: more are a slip, and would never end
Moments = dict[str, Tensor]  # running averages of a parameter's gradient, by name


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Early stopping: a sequence has converged if its ELBO grew by less than ``tolerance`` nats.

    The ELBO is the mean over ``window`` steps, compared with that of the ``window`` steps before.
    """

    window: int = 8
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"The stopping rule's window must be at least 1 step, got {self.window}.")
        if not math.isfinite(self.tolerance):
            raise UsageError(f"The stopping rule's tolerance must be a finite number of nats, got {self.tolerance}.")


@dataclass(frozen=True, kw_only=True)
class LocalInference:
    """The options of local inference (arXiv 2502.01567, algorithm 1, the inner loop).

    Args:
        steps: T_fast, fast steps per fit.
        rate: η_fast, the learning rate of the local parameters.
        optimizer: of the local parameters; ``natural`` is natural-gradient descent, for Gaussian guides.
        schedule: the schedule of the learning rate within a fit.
        init: the initial q.
        starts: how many starts each sequence has: that of ``init``, the others at draws from the prior. Evaluation fits
            q from each and keeps the best; training takes the one with the highest ELBO before the fast steps. By
            default 1, and in evaluation 8 under a prior that may have several modes.
        particles: S, draws of z per fast step, over which the ELBO is averaged.
        noise: ``fresh`` draws new noise at every step, ``antithetic`` in antithetic pairs; ``reused`` uses the same
            noise at all steps, as the published code does, for comparison only: its ELBO is no bound.
        kl: ``exact`` uses the closed form if there is one, else samples; ``path`` samples at every site and detaches
            q's parameters inside log q (sticking the landing, arXiv 1703.09194): its gradient has no noise if q is the
            posterior.
        stop: per-sequence early stopping, which drops converged sequences from the batch; None runs all steps.
        slow_gradient: the gradient of the global parameters: at the ``last`` q, or averaged over the ``trajectory``,
            the q before each fast step (`from_start` if there is only one).
        kl_weight: multiplies the KL in the objective of q and the decoder; 1 is the ELBO.
        cuda_graph: captures the fast steps as a CUDA graph at the second batch of a shape and replays it for later
            batches, which is faster but keeps the graph's memory; see `ltm_pyro.inference.cuda_graphs`.
        use_thoughts: if False, the decoder does not use z, as in the first stage of a warm start.
    """

    steps: int = 16
    rate: float = 0.3
    optimizer: Literal["adam", "adamw", "sgd", "natural"] = "adam"
    schedule: Literal["cosine", "constant"] = "cosine"
    init: Init = field(default_factory=Init)
    starts: int | None = None
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
        if self.starts is not None and not 1 <= self.starts <= MOST:
            raise UsageError(f"Starts must be 1 to {MOST}, got {self.starts}: leave them out for the default.")
        if (self.starts or 1) > 1 and self.noise == "reused":
            raise UsageError(f"Reused noise has one start, got {self.starts}: remove `starts`, or take fresh noise.")
        if max(self.steps, self.particles) > MOST:
            raise UsageError(f"Fast steps and particles are at most {MOST}, got {self.steps} and {self.particles}.")
        for name, value in (("rate", self.rate), ("kl_weight", self.kl_weight)):
            if not 0 <= value < math.inf:
                raise UsageError(f"Local inference needs a {name} that is finite and not negative, got {value}.")
        if self.noise == "reused" and self.stop:
            raise UsageError(
                "Reused noise is drawn for a whole batch: it cannot go with a stopping rule; remove `stop`."
            )
        if self.cuda_graph and (self.stop or self.noise == "reused"):
            raise UsageError(
                f"A CUDA graph has no random seed and cannot wait for converged sequences, got noise {self.noise} and "
                f"stop {self.stop}: remove them, or `cuda_graph`."
            )
        if self.noise == "antithetic" and self.particles % 2:
            raise UsageError(f"Antithetic noise needs pairs, got {self.particles} particles: choose an even number.")

    @property
    def draws(self) -> Draws:
        """How the ELBO of one step is estimated."""
        particles = None if self.particles == 1 else self.particles  # one draw needs no particle axis
        return Draws(particles, self.noise == "antithetic", self.kl, self.use_thoughts)

    def draws_of_step(self, state: "LocalState") -> Draws:
        """`draws` for the next fast step from a state: if it has keys, with new noise at every step unless reused."""
        if state.keys is None:
            return self.draws
        step = () if self.noise == "reused" else (state.steps_B,)
        return self.draws._replace(noise=RowNoise(state.keys.fold_in("fast step", *step)))

    def from_start(self) -> "LocalInference":
        """The options of a training step that begins at the initial q.

        The trajectory of one fast step is then the initial q alone, from which the decoder could learn nothing about
        the fit: the slow gradient is that of the ``last`` q instead.
        """
        alone = self.steps == 1 and self.slow_gradient == "trajectory"
        return replace(self, slow_gradient="last") if alone else self

    def loss(self, terms: ElboTerms) -> Float[Tensor, ""]:
        """The objective to minimise: −Σ (log p(x | z) − kl_weight · KL), in nats."""
        return (self.kl_weight * terms.kl_B - terms.log_likelihood_B).sum()

    def factor(self, step: int) -> float:
        """The schedule's factor on the learning rate at a step."""
        return cosine(step, self.steps) if self.schedule == "cosine" else 1.0


class LocalState(NamedTuple):
    """The state of a fit, by sequence: q's parameters, and the optimiser's moments and step counts.

    ``noise`` is the random seed of reused noise. ``keys`` are those of the sequences' own random streams; without them
    all noise comes from torch's generator.
    """

    parameters: LocalParameters
    moments: dict[str, Moments]
    steps_B: Int[Tensor, " B"]
    noise: int | None = None
    keys: RowKeys | None = None

    @property
    def has_parameters(self) -> bool:
        """Whether q has any local parameters; False for K = 0."""
        return any(x.numel() for x in self.parameters.values())

    def contiguous(self) -> "LocalState":
        """The same state with contiguous tensors."""
        moments = {name: {k: x.contiguous() for k, x in m.items()} for name, m in self.moments.items()}
        return self._replace(parameters={n: x.contiguous() for n, x in self.parameters.items()}, moments=moments)

    def select(self, index_b: Int[Tensor, " b"]) -> "LocalState":
        """The sequences at the given indices."""
        moments = {name: {k: x[index_b] for k, x in m.items()} for name, m in self.moments.items()}
        parameters = {name: x[index_b] for name, x in self.parameters.items()}
        keys = self.keys and self.keys.select(index_b)
        return self._replace(parameters=parameters, moments=moments, steps_B=self.steps_B[index_b], keys=keys)

    def put(self, index_b: Int[Tensor, " b"], state: "LocalState") -> "LocalState":
        """A copy in which the sequences at the given indices are replaced by those of ``state``."""

        def replaced(x_B: Tensor, new_b: Tensor) -> Tensor:
            return x_B.index_copy(0, index_b, new_b)

        moments = {
            name: {k: replaced(self.moments[name][k], x) for k, x in m.items()} for name, m in state.moments.items()
        }
        parameters = {name: replaced(self.parameters[name], x) for name, x in state.parameters.items()}
        return LocalState(parameters, moments, replaced(self.steps_B, state.steps_B), state.noise, self.keys)


class LocalInfo(NamedTuple):
    """The ELBO's terms before each fast step of a fit, in nats per sequence.

    ``steps_B`` is the number of steps of each sequence; entries after them (early stopping) are nan.
    """

    log_likelihood_NB: Float[Tensor, "N B"]
    kl_NB: Float[Tensor, "N B"]
    steps_B: Int[Tensor, " B"]

    @property
    def elbo_NB(self) -> Float[Tensor, "N B"]:
        """log p(x | z) − KL at the draws of each step, in nats."""
        return self.log_likelihood_NB - self.kl_NB

    @property
    def is_finite_B(self) -> Bool[Tensor, " B"]:
        """Whether the ELBO was finite at every step that a sequence took."""
        taken_NB = torch.arange(len(self.kl_NB), device=self.kl_NB.device)[:, None] < self.steps_B
        return (self.elbo_NB.isfinite() | ~taken_NB).all(0)
