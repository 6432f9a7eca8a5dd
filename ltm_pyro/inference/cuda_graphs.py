"""CUDA graphs: what is computed again and again on tensors of the same shapes is recorded once, and replayed since.

A replay launches all kernels of a fit at once, with no Python, no Pyro and no gaps between them.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ltm_pyro.errors import UsageError
from ltm_pyro.nn.precision import holding

Result = TypeVar("Result")
Tensors = Sequence[Tensor]
Capture = Callable[[Callable[[], None]], Callable[[], None]]

KEPT = 4  # recordings of one owner; each holds the memory of everything it computes


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Records what ``run`` launches, which is not computed yet; calling the result computes it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


CAPTURES: dict[str, Capture] = {"cuda": capture}


class _Recording:
    """A function's kernels, and the places where they read and write."""

    def __init__(
        self, capture: Capture, function: Callable[[list[Any]], Any], inputs: Sequence[Any], weights: Tensors
    ) -> None:
        self.inputs = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        self.weights = [x.detach().clone() for x in weights]

        def run() -> None:
            with holding(weights, self.weights):
                self.results, self.structure = tree_flatten(function(self.inputs))

        self.replay = capture(run)

    def __call__(self, inputs: Sequence[Any], weights: Tensors) -> Any:
        with torch.no_grad():
            for place, x in zip([*self.inputs, *self.weights], [*inputs, *weights], strict=True):
                if isinstance(place, Tensor):
                    place.copy_(x)
        self.replay()
        return tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in self.results], self.structure)


class Recordings:
    """The latest recordings of one kind of computation.

    The first call with new shapes computes as usual, which also tries out and compiles what needs to be; the second one
    records. What changes at every call is therefore never recorded.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.seen: OrderedDict[Hashable, _Recording | None] = OrderedDict()

    def __call__(
        self,
        key: Hashable,
        function: Callable[..., Result],
        arguments: Sequence[Any],
        weights: Tensors,
    ) -> Result:
        """``function(*arguments)``, replayed where it can be.

        Args:
            key: everything the function depends on beside tensors.
            function: of tensors, in tuples and dicts; it neither waits for the device nor takes a seed.
            weights: what the function reads without being given it; may lie elsewhere at every call.
        """
        inputs, structure = tree_flatten(arguments)
        whole = (key, str(structure), _kinds(inputs), _kinds(weights), _autocast())
        again = whole in self.seen
        recording = self.seen.pop(whole, None)
        if again and recording is None:
            recording = _Recording(self.capture, lambda x: function(*tree_unflatten(x, structure)), inputs, weights)
        self.seen[whole] = recording
        if len(self.seen) > KEPT:
            self.seen.popitem(last=False)
        return function(*arguments) if recording is None else recording(inputs, weights)


def _kinds(values: Sequence[Any]) -> Hashable:
    return tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in values)


def _autocast() -> Hashable:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


_OWNED: WeakKeyDictionary[object, Recordings] = WeakKeyDictionary()


def check_device(device: torch.device) -> None:
    """`UsageError` where the device has no graphs."""
    if device.type not in CAPTURES:
        raise UsageError(f"A CUDA graph needs a CUDA device, and the batch is on {device}: remove `cuda_graph`.")


def recordings(owner: object, device: torch.device) -> Recordings:
    """The recordings that live as long as ``owner``; `UsageError` where the device has no graphs."""
    check_device(device)
    return _OWNED.setdefault(owner, Recordings(CAPTURES[device.type]))
