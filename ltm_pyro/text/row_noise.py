"""One random stream per row: what is drawn for a row depends on its own key, not on the other rows of the batch.

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

Key = tuple[int, ...]  # seeds a row's random stream


class RowNoise(Messenger):
    """A Pyro handler: samples the sites of the plate of sequences row by row, each row from its own random stream.

    Args:
        keys: one for each of the B rows; a site with another number of rows is left alone.
    """

    def __init__(self, keys: Sequence[Key]) -> None:
        super().__init__()
        self.keys, self.sites = keys, 0

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn, plates = msg["fn"], {frame.name for frame in msg["cond_indep_stack"]}
        if SEQUENCES not in plates or msg["value"] is not None or fn.batch_shape[-1] != len(self.keys):
            return
        self.sites += 1
        with RowNoiseMode([(*key, self.sites) for key in self.keys], len(fn.batch_shape) - 1):
            msg["value"] = fn.rsample() if fn.has_rsample else fn.sample()


class RowNoiseMode(TorchDispatchMode):
    """A torch mode: runs every random operation once per row, on the row's slice of its arguments.

    Args:
        keys: one for each of the B rows.
        axis: the axis of the rows.
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
        parts, generator = [], _default_generator(args[0] if isinstance(args[0], Tensor) else kwargs.get("device"))
        before = generator.get_state()
        for row, key in enumerate(self.keys):
            generator.manual_seed(mix(*key, self.calls))
            parts.append(func(*(self._slice(x, row) for x in args), **kwargs))
        generator.set_state(before)
        return args[0] if func._schema.is_mutable else torch.cat(parts, self.axis)

    def _slice(self, x: Any, row: int) -> Any:
        """A row's slice of a tensor, or its share of a size; other arguments are the same for all rows."""
        if isinstance(x, Tensor) and x.dim():
            return x.narrow(self.axis, row * self._per_row(x.shape), self._per_row(x.shape))
        if isinstance(x, list | tuple) and x:
            return [self._per_row(x) if axis == self.axis else n for axis, n in enumerate(x)]
        return x

    def _per_row(self, shape: Sequence[int]) -> int:
        """How many entries of the axis belong to a row: several if a distribution has flattened later axes into it."""
        each, rest = divmod(shape[self.axis], len(self.keys)) if self.axis < len(shape) else (0, 1)
        if rest:
            raise UsageError(
                f"A prior or guide draws noise of shape {tuple(shape)}, which cannot be divided among {len(self.keys)} "
                f"rows: give its distribution a batch shape that ends in B."
            )
        return each


def _default_generator(where: Tensor | torch.device | None) -> torch.Generator:
    """The default generator of a tensor's device."""
    device = where.device if isinstance(where, Tensor) else torch.device(where or "cpu")
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]


def uniform(keys: Sequence[Key], purpose: int, count: int) -> Float[Tensor, "B N"]:
    """N uniform numbers in [0, 1) per row, from the random stream of its key for one purpose."""
    generators = [torch.Generator().manual_seed(mix(purpose, *key)) for key in keys]
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=generator) for generator in generators])
