"""Noise that belongs to a row: what a text is given depends on its seed and place alone, not on the texts beside it.

Shapes: B rows, N numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ltm_pyro.contracts import SEQUENCES
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.rng import mix

Key = tuple[int, ...]  # what a row's noise depends on


class RowNoise(Messenger):
    """Draws every site of the plate of sequences row by row, each row's noise from its own key.

    Args:
        keys: one for each of the B rows; a site with another number of rows is left alone.
    """

    def __init__(self, keys: Sequence[Key]) -> None:
        super().__init__()
        self.keys, self.draws = keys, 0

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn, plates = msg["fn"], {frame.name for frame in msg["cond_indep_stack"]}
        if SEQUENCES not in plates or msg["value"] is not None or fn.batch_shape[-1] != len(self.keys):
            return
        self.draws += 1
        with ByRow([(*key, self.draws) for key in self.keys], len(fn.batch_shape) - 1):
            msg["value"] = fn.rsample() if fn.has_rsample else fn.sample()


class ByRow(TorchDispatchMode):
    """Every random operation inside is called once a row, on that row's part of its arguments.

    Args:
        axis: where the rows are.
    """

    def __init__(self, keys: Sequence[Key], axis: int = 0) -> None:
        super().__init__()
        self.keys, self.axis, self.calls = keys, axis, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if self.axis and not func._schema.is_mutable:  # it may have flattened the particles into the rows
            raise UsageError("A prior or guide cannot draw its particles row by row: ask for one at a time.")
        self.calls += 1
        parts, generator = [], _generator(args[0] if isinstance(args[0], Tensor) else kwargs.get("device"))
        before = generator.get_state()
        for row, key in enumerate(self.keys):
            generator.manual_seed(mix(*key, self.calls))
            parts.append(func(*(self._part(x, row) for x in args), **kwargs))
        generator.set_state(before)
        return args[0] if func._schema.is_mutable else torch.cat(parts, self.axis)

    def _part(self, x: Any, row: int) -> Any:
        """A row's part of a tensor or of a size; other arguments are the same for all."""
        if isinstance(x, Tensor) and x.dim():
            return x.narrow(self.axis, row * self._rows(x.shape), self._rows(x.shape))
        if isinstance(x, list | tuple) and x:
            return [self._rows(x) if axis == self.axis else n for axis, n in enumerate(x)]
        return x

    def _rows(self, shape: Sequence[int]) -> int:
        """How many of the axis belong to one row: several where a distribution has flattened what lies behind it."""
        each, rest = divmod(shape[self.axis], len(self.keys)) if self.axis < len(shape) else (0, 1)
        if rest:
            raise UsageError(
                f"A prior or guide draws noise of shape {tuple(shape)}, which has no part for each of "
                f"{len(self.keys)} rows: give its distribution a batch shape that ends in B."
            )
        return each


def _generator(where: Tensor | torch.device | None) -> torch.Generator:
    """The default generator of a tensor's device."""
    device = where.device if isinstance(where, Tensor) else torch.device(where or "cpu")
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]


def uniform(keys: Sequence[Key], purpose: int, count: int) -> Float[Tensor, "B N"]:
    """Uniform numbers in [0, 1), N a row, for one purpose of each row's key."""
    generators = [torch.Generator().manual_seed(mix(purpose, *key)) for key in keys]
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=generator) for generator in generators])
