"""What a token costs, in floating-point operations: in training, by the paper's method and ours, and in inference.

Shapes: T tokens, L layers, K thoughts per layer, D width, V vocabulary, W window. A product of an (m, n) and an (n, p)
matrix counts 2·m·n·p; what is not a matrix product counts nothing.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from torch import nn

from ltm_pyro.contracts import Decoder, Guide, ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.nn.layers import CrossAttention, SelfAttention, SwiGLU


@runtime_checkable
class CountedDecoder(Protocol):
    """A decoder made of the parts of `ltm_pyro.nn.layers`: layers alike but for thoughts, and a tied embedding."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    window: int | None  # None if attention is full
    thought_layers: tuple[int, ...]
    thought_shape: ThoughtShape

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, the embedding once."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """All parts."""
        ...


class Flops(NamedTuple):
    """FLOPs per trained token: of all fast steps together, and of the slow step."""

    fast: float
    slow: float

    @property
    def total(self) -> float:
        """Fast and slow."""
        return self.fast + self.slow


class InferenceFlops(NamedTuple):
    """FLOPs per token of a fit of q, and of one forward pass, as for a token that is written or scored."""

    fit: float
    forward: float


class _Forward(NamedTuple):
    """FLOPs per token of one forward pass, by what a backward pass does to them."""

    stem: float  # up to the self-attention of the first layer with thoughts: z does not enter
    query: float  # that layer's cross-attention queries: they come straight from the stem
    matrices: float  # all other projections of tokens, and the vocabulary's
    attention: float  # scores and weighted sums after the stem
    thoughts: float  # keys and values of the thoughts, the values projected for every head, once per sequence

    @property
    def total(self) -> float:
        return sum(self)


def flops_per_token_as_published(decoder: Decoder, length: int, steps: int) -> Flops:
    r"""What the published method spends per token of a sequence of ``length`` tokens, as its authors count.

    .. math:: (T_\mathrm{fast} + 1) \, (6 N + 6 L D T), \quad N = \text{all parameters of the decoder}

    Every fast step is a whole forward and backward pass. Source: arXiv 2502.01567, its table of model sizes.
    """
    counted = _counted(decoder)
    parameters = sum(p.numel() for p in counted.parameters())
    once = 6.0 * (parameters + counted.layers * counted.width * length)
    return Flops(fast=steps * once, slow=once)


def flops_per_token(decoder: Decoder, guide: Guide, length: int, inference: LocalInference) -> Flops:
    """What `ltm_pyro.inference.local.training_loss` spends per token of a sequence of ``length`` tokens.

    From a fresh start it follows ``inference.from_start()``.

    A backward pass costs a projection once for its input and once for its weights, an attention product once for each
    factor; if the embedding learns, the logits are computed twice. The stem is computed once per batch. With
    ``slow_gradient="last"`` a fast step needs no gradient of the weights, and the slow step covers everything; with
    ``"trajectory"`` every fast step needs them as well, and the slow step is left with the stem alone. Every particle
    goes through all but the stem. Early stopping saves an amount that is not known beforehand, and not counted. A guide
    without fast steps pays for the gradients of its `finalize`, and its encoder learns in the slow step. Without
    ``inference.use_thoughts`` there is neither cross-attention nor a fast step. Of several ``inference.starts`` each is
    a forward pass.
    """
    counted = _counted(decoder)
    one = _forward(counted, length, inference.use_thoughts)
    steps = inference.steps if counted.thought_shape.thoughts and inference.use_thoughts else 0
    fast_steps, final_steps = (steps if guide.uses_fast_steps else 0), (guide.finalize_cost(steps) if steps else 0)
    draws, again = inference.particles, 2.0 * counted.vocabulary * counted.width
    gradient = one.query + 2 * (one.matrices + one.thoughts) + 3 * one.attention
    learned = 3 * (one.total - one.stem) + again
    starts = inference.starts or 1
    choice = starts * (one.total - one.stem) if fast_steps and starts > 1 else 0.0
    if inference.slow_gradient == "trajectory" and fast_steps:
        return Flops(fast=draws * fast_steps * learned + final_steps * gradient + choice, slow=3 * one.stem)
    encoder = 3 * _encoder(guide, length) if steps else 0.0
    slow = 3 * one.stem + draws * (learned - (0 if encoder else one.thoughts)) + encoder  # who else needs z's gradient?
    return Flops(fast=(draws * fast_steps + final_steps) * gradient + choice, slow=slow)


def inference_flops(decoder: Decoder, guide: Guide, length: int, inference: LocalInference) -> InferenceFlops:
    """What inference spends per token of a sequence of ``length`` tokens, counted as in `flops_per_token`."""
    one = _forward(_counted(decoder), length, inference.use_thoughts)
    steps = inference.steps if _counted(decoder).thought_shape.thoughts and inference.use_thoughts else 0
    passes = inference.particles * (steps if guide.uses_fast_steps else 0) + (
        guide.finalize_cost(steps) if steps else 0
    )
    gradient = one.query + 2 * (one.matrices + one.thoughts) + 3 * one.attention
    return InferenceFlops(one.stem + passes * gradient if passes else 0.0, one.total)


def _counted(decoder: Decoder) -> CountedDecoder:
    if not isinstance(decoder, CountedDecoder):
        raise UsageError(
            f"The FLOPs of {type(decoder).__name__} cannot be counted, because it is not made of layers as in "
            f"ltm_pyro.models.Decoder: give it the attributes of ltm_pyro.training.flops.CountedDecoder."
        )
    return decoder


def _encoder(guide: Guide, length: int) -> float:
    """FLOPs per token of reading a sequence once; what is done once per sequence counts nothing."""
    parts = guide.modules() if isinstance(guide, nn.Module) else ()
    layers = [m for m in parts if isinstance(m, SelfAttention | SwiGLU)]
    matrices = 2.0 * sum(p.numel() for m in layers for p in m.parameters())
    windows = [4.0 * m.width * _keys(m.window, length) for m in layers if isinstance(m, SelfAttention)]
    return matrices + sum(windows)


def _forward(decoder: CountedDecoder, length: int, use_thoughts: bool) -> _Forward:
    thought_layers, thoughts, _ = decoder.thought_shape
    below, rest = decoder.thought_layers[0] - 1, decoder.layers - decoder.thought_layers[0]
    speak, query = _projections(decoder, SelfAttention), _projections(decoder, CrossAttention, "query")
    feed = _projections(decoder, SwiGLU)
    constants_LKD = getattr(decoder, "constants_LKD", None)
    thoughts = thoughts if constants_LKD is None else constants_LKD.shape[1]
    if not use_thoughts:
        thoughts, query = 0, 0.0
    window = 4.0 * decoder.width * _keys(decoder.window, length)
    vocabulary = 2.0 * decoder.vocabulary * decoder.width
    return _Forward(
        stem=below * (speak + window + feed) + speak + window,
        query=query,
        matrices=rest * speak + (thought_layers - 1) * query + (rest + 1) * feed + vocabulary,
        attention=rest * window + thought_layers * 2.0 * decoder.width * thoughts * (1 + decoder.heads),
        thoughts=thought_layers * _projections(decoder, CrossAttention, "key_value", "output") * thoughts / length,
    )


def _keys(window: int | None, length: int) -> float:
    """How many keys a query is multiplied with, the padding of the last block shared among the tokens."""
    if window is None or window >= length:
        return float(length)
    return 2.0 * window * -(-length // window) * window / length


def _projections(decoder: CountedDecoder, kind: type[nn.Module], *parts: str) -> float:
    """2 · weights that one ``kind`` of sublayer holds, all together or in some ``parts``; 0 where there is none."""
    sublayers = [m for m in decoder.modules() if isinstance(m, kind)]
    holders = [m.get_submodule(part) for m in sublayers for part in parts or ("",)]
    return 2.0 * sum(p.numel() for m in holders for p in m.parameters()) / max(len(sublayers), 1)
