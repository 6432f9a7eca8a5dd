"""One random stream per sequence: what is drawn for a sequence depends on its own key, not on the rest of its batch.

Without keys, sequences share torch's generator, as in training. With keys, every random number is a function of the
sequence's key, of what it is drawn for, and of the number of the draw (a counter-based generator, as in JAX).
Shapes: B sequences, S particles, C = S·B cells, N numbers per cell.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ltm_pyro.contracts import SEQUENCES, Batch
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.masking import StratifiedUniform
from ltm_pyro.utils.rng import mix

WEYL = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64 (Steele, Lea & Flood 2014)


class RowKeys(NamedTuple):
    """The key of each sequence's random stream, and the random seed of what all sequences share."""

    key_B: Int[Tensor, " B"]
    seed: int

    @classmethod
    def of_batch(cls, batch: Batch, seed: int) -> "RowKeys":
        """Keys that depend on the seed and on each sequence's own tokens and mask; padding does not change them.

        Equal sequences have equal keys, whatever their batch, their place in it and the other sequences.
        """
        counts_BT = batch.mask_BT.flip(-1).cumsum(-1).flip(-1) > 0  # everything up to the last scored token
        word_BT = (batch.inputs_BT.long() << 32) + 2 * batch.targets_BT.long() + batch.mask_BT
        position_T = torch.arange(1, word_BT.shape[1] + 1, device=word_BT.device)
        content_B = (fold_in(scramble(word_BT), position_T) * counts_BT).sum(-1)
        return cls(fold_in(scramble(content_B), mix(seed)), seed)

    def fold_in(self, *data: int | str | Tensor) -> "RowKeys":
        """New keys from these and from data: numbers, words, or a number for each sequence."""
        key_B = self.key_B
        for each in data:
            key_B = fold_in(key_B, zlib.crc32(each.encode()) if isinstance(each, str) else each)
        return RowKeys(key_B, self.seed)

    def select(self, index_b: Int[Tensor, " b"]) -> "RowKeys":
        """The keys of the sequences at the given indices."""
        return RowKeys(self.key_B[index_b], self.seed)

    def uniform(self, count: int) -> Float[Tensor, "B N"]:
        """``count`` numbers in [0, 1) for each sequence."""
        return _uniform(self.key_B, count, torch.float64)


class RowNoise(Messenger):
    """A Pyro handler: the sites of the plate of sequences are sampled from each sequence's own random stream.

    Args:
        keys: one for each of the B sequences; the sites' batch shapes end in B.
        first: the number of the first draw, if the draws of a plate of particles come in several parts.
    """

    def __init__(self, keys: RowKeys, first: int = 0) -> None:
        super().__init__()
        self.keys, self.first, self.sites = keys, first, 0

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and any(frame.name == SEQUENCES for frame in msg["cond_indep_stack"]):
            msg["value"] = self.sample(msg["fn"], msg["name"])

    def sample(self, fn: Distribution, name: str) -> Tensor:
        """A sample of one site, reparameterised if the distribution can be."""
        key_B, shape = self.keys.key_B, fn.batch_shape
        if shape[-1:] != key_B.shape:
            raise UsageError(
                f"Site '{name}' has batch shape {tuple(shape)} for {len(key_B)} sequences: give its distribution a "
                f"batch shape that ends in B."
            )
        if isinstance(fn, StratifiedUniform):
            return fn.of_rows(*self._sets(shape, fn.STRATA))
        with self.mode(shape):
            return fn.rsample() if fn.has_rsample else fn.sample()

    def _sets(self, shape: torch.Size, strata: int) -> tuple[Tensor, Tensor]:
        """A uniform number for each cell, the same for each set of a row's draws, and the numbers of the draws."""
        self.sites += 1
        draw_S1 = torch.arange(self.first, self.first + shape[:-1].numel(), device=self.keys.key_B.device)[:, None]
        key_SB = fold_in(fold_in(self.keys.key_B, self.sites), draw_S1 // strata)
        uniform_SB = _uniform(key_SB.flatten(), 1, torch.float64).view(shape)
        return uniform_SB, draw_S1.view(*shape[:-1], 1)

    def mode(self, shape: torch.Size) -> "RowNoiseMode":
        """A torch mode in which each cell of a shape (…, B) has a random stream of its own, new at every call."""
        self.sites += 1
        key_B = fold_in(self.keys.key_B, self.sites)
        draw_S1 = torch.arange(self.first, self.first + shape[:-1].numel(), device=key_B.device)[:, None]
        return RowNoiseMode(fold_in(key_B, draw_S1).flatten(), shape)


@contextmanager
def keyed(keys: RowKeys | None, *data: int | str) -> Iterator[None]:
    """Inside, all noise is each sequence's own: that of sites, and that of other tensors with leading axis B.

    Every torch operation passes through Python inside, so it is for short computations. Without keys nothing changes.
    """
    if keys is None:
        yield
        return
    keys = keys.fold_in(*data)
    with RowNoise(keys), RowNoiseMode(keys.key_B, keys.key_B.shape):
        yield


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation that can draw noise does; attention without dropout does not."""
    names = [argument.name for argument in func._schema.arguments]
    return "dropout_p" not in names or bool({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0))


class RowNoiseMode(TorchDispatchMode):
    """A torch mode: a random operation on tensors of shape (*batch_shape, …) fills every cell from the cell's own key.

    The batch shape may be flattened to one axis, together with axes after it, as `torch.distributions.Categorical`
    does. Normal and uniform numbers are computed for all cells at once; other distributions are sampled cell by cell.

    Args:
        key_C: one key for each of the C cells of ``batch_shape``.
    """

    def __init__(self, key_C: Int[Tensor, " C"], batch_shape: Sequence[int]) -> None:
        super().__init__()
        self.key_C, self.batch_shape, self.calls = key_C, tuple(batch_shape), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or not _is_random(func, args, kwargs):
            return func(*args, **kwargs)
        self.calls += 1
        match func._schema.name.removeprefix("aten::"), args:
            case "normal_", (x, *moments):
                return x.copy_(self._scaled(_normal, x, *moments, **kwargs))
            case "uniform_", (x, *limits):
                low, high = [0.0, 1.0] if not limits else [limits[0], limits[1] if len(limits) > 1 else 1.0]
                return x.copy_(self._scaled(_uniform, x, low, high - low))
            case "normal", (mean, std) if isinstance(mean, Tensor) or isinstance(std, Tensor):
                like = torch.add(mean, std) if isinstance(mean, Tensor) else torch.add(std, mean)
                return self._scaled(_normal, like, mean, std)
            case ("randn" | "rand") as name, (size, *_):
                like = torch.empty(size, **{k: v for k, v in kwargs.items() if k != "generator"})
                return self._scaled(_normal if name == "randn" else _uniform, like)
            case ("randn_like" | "rand_like") as name, (like, *_):
                like = torch.empty_like(like, **kwargs)
                return self._scaled(_normal if name == "randn_like" else _uniform, like)
        return self._cell_by_cell(func, args, kwargs)

    def _scaled(self, draw: Any, like: Tensor, mean: Any = 0.0, std: Any = 1.0, generator: Any = None) -> Tensor:
        """mean + std · numbers in the shape and dtype of a tensor."""
        count = math.prod(self._shape_of_cell(like.shape))
        key_C = fold_in(self.key_C, self.calls).to(like.device)
        x = draw(key_C, count, like.dtype).view(like.shape)
        return (x * std + mean).to(like.dtype)

    def _shape_of_cell(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A cell's part of a tensor of the given shape."""
        lead, cells = len(self.batch_shape), len(self.key_C)
        if tuple(shape[:lead]) == self.batch_shape:
            return tuple(shape[lead:])
        if shape and shape[0] and shape[0] % cells == 0:  # a distribution has flattened axes
            return shape[0] // cells, *shape[1:]
        raise UsageError(
            f"A prior or guide draws noise of shape {tuple(shape)}, which cannot be divided among the sequences: give "
            f"it the leading shape {self.batch_shape}."
        )

    def _cell_by_cell(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation once per cell, with torch's generator seeded by the cell's key."""
        where = next((x.device for x in args if isinstance(x, Tensor)), kwargs.get("device"))
        generator, parts = _default_generator(where), []
        before = generator.get_state()
        keys = fold_in(self.key_C, self.calls).tolist()
        for cell, key in enumerate(keys):
            generator.manual_seed(key)
            with _disable_current_modes():  # or an outer mode would take the operation for its own
                parts.append(func(*(self._part(x, cell) for x in args), **kwargs))
        generator.set_state(before)
        shape = next(self._whole(x, parts[0]) for x in args if self._is_shaped(x))
        whole = torch.stack(parts).view(shape)
        return args[0].copy_(whole) if func._schema.is_mutable else whole

    def _is_shaped(self, x: Any) -> bool:
        return bool(isinstance(x, Tensor) and x.dim()) or (isinstance(x, list | tuple) and bool(x))

    def _part(self, x: Any, cell: int) -> Any:
        """A cell's part of a tensor or of a size; other arguments are the same for all cells."""
        if not self._is_shaped(x):
            return x
        shape = self._shape_of_cell(x.shape if isinstance(x, Tensor) else x)
        return x.reshape(len(self.key_C), *shape)[cell] if isinstance(x, Tensor) else [*shape]

    def _whole(self, argument: Any, part: Tensor) -> tuple[int, ...]:
        """The shape of all cells' results together, in the form that the argument has."""
        shape = tuple(argument.shape if isinstance(argument, Tensor) else argument)
        if shape[: len(self.batch_shape)] == self.batch_shape:
            return *self.batch_shape, *part.shape
        return len(self.key_C) * part.shape[0], *part.shape[1:]


def _default_generator(where: torch.device | None) -> torch.Generator:
    """The default generator of a device."""
    device = torch.device(where or "cpu")
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]


def fold_in(key: Int[Tensor, "*C"], data: int | Tensor) -> Int[Tensor, "*D"]:
    """A new key from a key and a number, such as that of a draw; both broadcast."""
    return scramble(key + _signed((data + 1) * WEYL) if isinstance(data, int) else key + (data + 1) * _signed(WEYL))


def scramble(x: Int[Tensor, "*C"]) -> Int[Tensor, "*C"]:
    """The output function of SplitMix64: a bijection of 64 bits, each of which depends on all bits of x."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own repeats the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The two's complement of 64 bits."""
    return (x + 2**63) % 2**64 - 2**63


def _words(key_C: Int[Tensor, " C"], count: int) -> Int[Tensor, "C N"]:
    """``count`` random integers of 64 bits for each key."""
    return fold_in(key_C[:, None], torch.arange(count, device=key_C.device))


def _uniform(key_C: Int[Tensor, " C"], count: int, dtype: torch.dtype) -> Float[Tensor, "C N"]:
    """Numbers in [0, 1), of as many bits as the dtype's mantissa has."""
    bits, dtype = (53, torch.float64) if dtype == torch.float64 else (24, torch.float32)
    return _shift(_words(key_C, count), 64 - bits).to(dtype) * 2.0**-bits


def _normal(key_C: Int[Tensor, " C"], count: int, dtype: torch.dtype) -> Float[Tensor, "C N"]:
    """Standard normal numbers, two from each integer (Box & Muller 1958)."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    word_CM = _words(key_C, (count + 1) // 2)
    radius_CM = _shift(word_CM, 32).add_(1).to(dtype).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle_CM = (word_CM & (2**32 - 1)).to(dtype).mul_(2 * math.pi * 2.0**-32)
    return torch.cat([radius_CM * angle_CM.cos(), radius_CM * angle_CM.sin()], dim=1)[:, :count]
