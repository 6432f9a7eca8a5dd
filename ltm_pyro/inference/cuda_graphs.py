"""CUDA graph capture and replay: a computation that repeats with the same shapes is captured once, then replayed.

A replay launches all kernels of a fit at once, without Python or Pyro between them.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ltm_pyro.errors import UsageError
from ltm_pyro.nn.precision import swap_data

Result = TypeVar("Result")
Tensors = Sequence[Tensor]
Capture = Callable[[Callable[[], None]], Callable[[], None]]  # a function -> what replays it

MAX_GRAPHS = 4  # per owner, because each graph keeps the memory of everything it computes


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Captures the kernels that ``run`` launches, without running them; the returned function runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


CAPTURES: dict[str, Capture] = {"cuda": capture}


class _CapturedGraph:
    """The kernels of a function, and the buffers that they read from and write to."""

    def __init__(
        self, capture: Capture, function: Callable[[list[Any]], Any], inputs: Sequence[Any], weights: Tensors
    ) -> None:
        self.inputs = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        self.weights = [x.detach().clone() for x in weights]

        def run() -> None:
            with swap_data(weights, self.weights):
                self.results, self.structure = tree_flatten(function(self.inputs))

        self.replay = capture(run)

    def __call__(self, inputs: Sequence[Any], weights: Tensors) -> Any:
        with torch.no_grad():
            for buffer, x in zip([*self.inputs, *self.weights], [*inputs, *weights], strict=True):
                if isinstance(buffer, Tensor):
                    buffer.copy_(x)
        self.replay()
        return tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in self.results], self.structure)


class GraphCache:
    """The most recently used graphs of one owner, at most `MAX_GRAPHS`.

    The first call with new shapes runs the function without a graph, which also compiles kernels and chooses backends;
    the second call captures. Shapes that differ at every call are therefore never captured.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.graphs: OrderedDict[Hashable, _CapturedGraph | None] = OrderedDict()  # None after the first call

    def __call__(
        self,
        key: Hashable,
        function: Callable[..., Result],
        arguments: Sequence[Any],
        weights: Tensors,
    ) -> Result:
        """``function(*arguments)``, replayed if it has been captured.

        Args:
            key: everything besides tensors that the result depends on.
            function: takes and returns tensors, in tuples and dicts; it must not wait for the device or set a seed.
            weights: tensors that the function reads but that are not arguments; their memory may change between calls.
        """
        inputs, structure = tree_flatten(arguments)
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        full_key = (key, str(structure), _signature(inputs), _signature(weights), autocast)
        called_before = full_key in self.graphs
        graph = self.graphs.pop(full_key, None)
        if called_before and graph is None:
            graph = _CapturedGraph(self.capture, lambda x: function(*tree_unflatten(x, structure)), inputs, weights)
        self.graphs[full_key] = graph
        if len(self.graphs) > MAX_GRAPHS:
            self.graphs.popitem(last=False)
        return function(*arguments) if graph is None else graph(inputs, weights)


def _signature(values: Sequence[Any]) -> Hashable:
    return tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in values)


_CACHES: WeakKeyDictionary[object, GraphCache] = WeakKeyDictionary()


def check_device(device: torch.device) -> None:
    """Raises `UsageError` if the device has no CUDA graphs."""
    if device.type not in CAPTURES:
        raise UsageError(f"A CUDA graph needs a CUDA device, and the batch is on {device}: remove `cuda_graph`.")


def graph_cache(owner: object, device: torch.device) -> GraphCache:
    """The graphs of ``owner``, which are freed with it; raises `UsageError` if the device has no CUDA graphs."""
    check_device(device)
    return _CACHES.setdefault(owner, GraphCache(CAPTURES[device.type]))
