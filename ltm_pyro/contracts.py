"""The interfaces of priors, models, decoders and guides; the names of sites and plates; the batch.

Shapes, here and everywhere: B sequences, T tokens, L layers, K thoughts per layer, D width, V vocabulary, S posterior
samples (particles), N fast steps. A tensor carries its axes as a suffix: ``z_BLKD``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import pyro
import torch
from jaxtyping import Bool, Float, Int
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from ltm_pyro.errors import UsageError

Z = "z"  # the usual name of the site of the thoughts; a prior may use other names
TOKENS = "tokens"  # the observed site
SEQUENCES = "sequences"  # the plate of one batch, dim -1
PARTICLES = "particles"  # the plate of posterior samples, dim -2

LocalParameters = dict[str, Tensor]  # q's parameters by name, each with leading axis B


@lru_cache(maxsize=64)
def sequence_plate(size: int) -> pyro.plate:
    """The plate `SEQUENCES` at dim −1, created once per size because it is entered again at every fast step.

    Creating a plate emits a sample site for its subsample. `poutine.block` hides that site, so that a trace does not
    depend on whether it is the first one of its size.
    """
    with poutine.block():
        return pyro.plate(SEQUENCES, size, dim=-1)


class ThoughtShape(NamedTuple):
    """The shape (L, K, D) of one sequence's thoughts; K = 0 is the plain autoregressive model."""

    layers: int
    thoughts: int
    width: int


class DocumentInfo(NamedTuple):
    """What is known of a document: its id, its file, its source, and its labels (None where one is missing).

    ``exact_nats`` is −log p(x) where the document was generated and that is known.
    """

    id: str | int
    file: str = ""
    source: str = ""
    labels: Mapping[str, str | int | float | bool | None] = {}
    exact_nats: float | None = None


class Part(NamedTuple):
    """A document, or a piece of one, in a row of tokens.

    ``number`` counts the documents of the corpus, ``piece`` those pieces of a document that fill a row each (None where
    rows are cut out of a stream), both from 0; ``offset`` tokens of the document are in earlier rows.
    """

    number: int
    piece: int | None
    offset: int
    document: DocumentInfo


def whole_pieces(parts: Sequence[tuple[Part, ...]] | None) -> list[Part] | None:
    """The piece of a document that each row is; None if that is not known, or a row is not of one document alone."""
    return [row[0] for row in parts] if parts and all(len(row) == 1 for row in parts) else None


class Batch(NamedTuple):
    """B sequences of T tokens; ``inputs_BT`` is the start token, then ``targets_BT`` without its last token.

    Every token whose mask is True is scored exactly once; padding never changes a sequence's ELBO. ``bytes_B`` is the
    number of UTF-8 bytes of the targets' text, for bits per byte. ``stem_BTD`` is the part of the network's activations
    that does not depend on z, computed once per batch. q is fitted to the tokens of ``observed_BT``, which are the
    scored ones if it is None. ``parts`` are the documents of each sequence, None if the data do not tell them. All
    tokens are known to be from 0 to below ``below``, so that nobody has to ask the device; None if they are not, as
    after a change of the tokens. ``covariates_BC`` are the numbers of the labels that the prior asks for
    (`ltm_pyro.inference.covariates`).
    """

    inputs_BT: Int[Tensor, "B T"]
    targets_BT: Int[Tensor, "B T"]
    mask_BT: Bool[Tensor, "B T"]
    ids_B: Int[Tensor, " B"]
    bytes_B: Int[Tensor, " B"]
    stem_BTD: Float[Tensor, "B T D"] | None = None
    observed_BT: Bool[Tensor, "B T"] | None = None
    parts: tuple[tuple[Part, ...], ...] | None = None
    below: int | None = None
    covariates_BC: Float[Tensor, "B C"] | None = None

    @property
    def observed(self) -> "Batch":
        """The batch that q is fitted to, whose scored tokens are those that q sees."""
        return self if self.observed_BT is None else self._replace(mask_BT=self.observed_BT, observed_BT=None)

    def crop(self, first: int, last: int) -> "Batch":
        """The first ``last`` tokens, of which those from position ``first`` on are scored."""
        scored_T = torch.arange(last, device=self.mask_BT.device) >= first
        stem_BTD = None if self.stem_BTD is None else self.stem_BTD[:, :last]
        inputs_BT, targets_BT, mask_BT = (x[:, :last] for x in self[:3])
        mask_BT = mask_BT & scored_T
        observed_BT = None if self.observed_BT is None else self.observed_BT[:, :last]
        return self._replace(
            inputs_BT=inputs_BT, targets_BT=targets_BT, mask_BT=mask_BT, stem_BTD=stem_BTD, observed_BT=observed_BT
        )

    def select(self, index_B: Int[Tensor, " b"]) -> "Batch":
        """The sequences at the given indices."""
        parts = self.parts and tuple(self.parts[index] for index in index_B.tolist())
        return Batch._make(x[index_B] if isinstance(x, Tensor) else x for x in self)._replace(parts=parts)

    @property
    def size(self) -> int:
        """B, the number of sequences."""
        return self.inputs_BT.shape[0]

    @property
    def tokens_B(self) -> Int[Tensor, " B"]:
        """The number of scored tokens of each sequence."""
        return self.mask_BT.sum(-1)

    def check_tokens(self, vocabulary: int) -> None:
        """Raises `UsageError` for a token that is not one of a model's ``vocabulary``.

        Otherwise an index is out of range, which on a CUDA device ends all further work of the process. The host waits
        for the device only if the tokens were made there, and were not looked at before (`below`).
        """
        if self.inputs_BT.device.type != "cpu" and self.below is not None and self.below <= vocabulary:
            return
        tokens = [x for x in (self.inputs_BT, self.targets_BT) if x is not None and x.numel() and not x.is_meta]
        extremes = torch.stack([x for each in tokens for x in each.aminmax()]).tolist() if tokens else []
        if wrong := [token for token in extremes if not 0 <= token < vocabulary]:
            raise UsageError(
                f"A batch has the token {wrong[0]}, but the model's tokens are 0 to {vocabulary - 1}: encode the text "
                f"with the model's own tokenizer."
            )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch._make(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self)


def make_batch(
    tokens_BT: Int[Tensor, "B T"],
    lengths_B: Int[Tensor, " B"],
    start_token: int,
    ids_B: Int[Tensor, " B"] | None = None,
    bytes_B: Int[Tensor, " B"] | None = None,
) -> Batch:
    """A `Batch` of right-padded token rows: the inputs start with ``start_token``, ``lengths_B`` gives the mask."""
    if tokens_BT.dim() != 2 or tokens_BT.is_floating_point() or lengths_B.shape != tokens_BT.shape[:1]:
        raise UsageError(
            f"A batch needs whole-number tokens of shape (B, T) and B lengths, got {tokens_BT.dtype} of shape "
            f"{tuple(tokens_BT.shape)} and lengths of shape {tuple(lengths_B.shape)}."
        )
    size, length = tokens_BT.shape
    start_B1, below = tokens_BT.new_full((size, 1), start_token), None
    if tokens_BT.device.type == "cpu" and tokens_BT.numel():
        lowest, highest = (int(x) for x in tokens_BT.aminmax())
        below = max(highest, start_token) + 1 if min(lowest, start_token) >= 0 else None
    return Batch(
        inputs_BT=torch.cat([start_B1, tokens_BT[:, :-1]], dim=1),
        targets_BT=tokens_BT,
        mask_BT=torch.arange(length, device=tokens_BT.device) < lengths_B[:, None],
        ids_B=torch.arange(size, device=tokens_BT.device) if ids_B is None else ids_B,
        bytes_B=lengths_B.new_zeros(size) if bytes_B is None else bytes_B,
        below=below,
    )


@runtime_checkable
class Prior(Protocol):
    """p(z): any `pyro.sample` statements that together return ``z_BLKD`` inside the plate of sequences."""

    def __call__(self, **labels: Tensor) -> Float[Tensor, "... L K D"]:
        """Samples the thoughts of every sequence of the enclosing plate.

        A prior that asks for labels gets the numbers of each sequence's (`ltm_pyro.inference.covariates`).
        """
        ...


@runtime_checkable
class Model(Protocol):
    """p(x, z): a Pyro model of one batch. `sample_prior` samples z only; a call samples z and observes the tokens."""

    def sample_prior(self, size: int) -> Float[Tensor, "... L K D"]:
        """Samples z for ``size`` sequences inside the plate `SEQUENCES`."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """The batch with ``stem_BTD``, the activations that do not depend on z; may return the batch unchanged."""
        ...

    def __call__(self, batch: Batch) -> Any:
        """Samples z, then observes ``batch.targets_BT`` at the site `TOKENS`.

        A model that can first train without thoughts (``inference.use_thoughts`` False) also accepts
        ``use_thoughts=False``: the tokens then do not depend on z.
        """
        ...

    def observation(self, z_BLKD: Float[Tensor, "... L K D"], batch: Batch) -> Any:
        """p(x | z), the distribution of the site `TOKENS`."""
        ...

    def observed(self, batch: Batch) -> Any:
        """x, the value of the site `TOKENS`."""
        ...

    training: bool

    def train(self, mode: bool = True) -> Any:
        """Switches between training and evaluation mode, as `torch.nn.Module.train` does."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The global parameters: decoder and prior."""
        ...

    def modules(self) -> Iterator[torch.nn.Module]:
        """All submodules, as `torch.nn.Module.modules` gives them."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The global parameters by name."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """The network of p(x | z): maps tokens and thoughts to hidden states, and hidden states to logits.

    It need not be autoregressive, and it need not have thoughts: a network without latent variables has
    ``thought_shape.thoughts`` 0 and takes None as z. A decoder that generates token by token is a `CachedDecoder`.
    """

    vocabulary: int
    length: int
    thought_shape: ThoughtShape

    def stem(self, inputs_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The part of the network that does not depend on z."""
        ...

    def __call__(
        self, stem_BTD: Float[Tensor, "B T D"], z_BLKD: Float[Tensor, "... B L K thought"] | None
    ) -> Float[Tensor, "... B T D"]:
        """The final hidden states, for every particle of z; without cross-attention if z is None."""
        ...

    def logits(self, hidden_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Unnormalised log-probabilities of the whole vocabulary."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All parameters; a shared parameter appears once."""
        ...

    def modules(self) -> Iterator[torch.nn.Module]:
        """All submodules, as `torch.nn.Module.modules` gives them."""
        ...


@runtime_checkable
class CachedDecoder(Decoder, Protocol):
    """An autoregressive `Decoder` with a key/value cache: position t predicts token t + 1."""

    def init_cache(self, z_BLKD: Float[Tensor, "B L K thought"]) -> Any:
        """An empty key/value cache for B rows."""
        ...

    def decode_step(
        self,
        tokens_BT: Int[Tensor, "B T"],
        cache: Any,
        lengths_B: Int[Tensor, " B"] | None = None,
        compile: bool = False,
    ) -> Float[Tensor, "B D"]:
        """The hidden state at the last new token of each row; the new tokens are added to the cache in place."""
        ...


class TextModel(Model, Protocol):
    """A `Model` that consists of a prior and a decoder: a recipe describes one, a run contains one."""

    prior: Any
    decoder: CachedDecoder


@dataclass(frozen=True, kw_only=True)
class Init:
    """The initial q: a Gaussian guide starts at the prior's mean and variance in unconstrained coordinates.

    Where they do not exist it is the median and the distance between quantiles, and else 0 and 1
    (`ltm_pyro.inference.latent_sites.prior_moments`).

    Args:
        log_var: log of q's variance divided by the prior's; 0 is the prior's variance, −5 the published code's.
        jitter: standard deviation of the noise added to the means, in prior standard deviations.
    """

    log_var: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not (-100 <= self.log_var <= 100 and 0 <= self.jitter < math.inf):
            raise UsageError(f"The initial q needs a log_var from -100 to 100 and a jitter of 0 or more, got {self}.")


class Guide(ABC):
    """q(z | x): a variational family, created for a model. It stores no local parameters: they are arguments.

    A family with global parameters, such as an encoder, is also a `torch.nn.Module`: the slow step trains it, and it is
    saved in checkpoints.
    """

    has_density: ClassVar[bool] = True  # False for a point estimate or a sampler's last state: there is no bound
    uses_fast_steps: ClassVar[bool] = True  # False if `finalize` alone computes q
    strata: ClassVar[int] = 1  # consecutive draws of a sequence that are not independent, but spread evenly

    @abstractmethod
    def __init__(self, model: Model) -> None: ...

    @abstractmethod
    def init(self, sites: Mapping[str, Distribution], init: Init) -> LocalParameters:
        """Initial local parameters for the prior's sites (distributions by name, batch shape (B,))."""

    @abstractmethod
    def __call__(self, batch: Batch, local: LocalParameters) -> Any:
        """Samples every latent site from q inside the plate `SEQUENCES`."""

    def finalize(self, model: Model, batch: Batch, local: LocalParameters, steps: int, rate: float) -> LocalParameters:
        """q after the last fast step, for families that need a computation after it. The model is frozen.

        It is not called if ``steps`` is 0, which leaves q at its initial value.

        Args:
            steps: number of fast steps of local inference.
            rate: learning rate of local inference.
        """
        return local

    def finalize_cost(self, steps: int) -> int:
        """The cost of `finalize` after ``steps`` fast steps: the number of gradients of log p(x, z) it computes."""
        return 0

    def natural_gradient(self, local: LocalParameters, gradients: LocalParameters) -> LocalParameters:
        """F⁻¹ ∇, the natural gradient, where F is the Fisher information of q (Amari 1998)."""
        raise UsageError(f"{type(self).__name__} has no natural gradient: choose the optimizer adam, adamw or sgd.")
