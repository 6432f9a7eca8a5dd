"""Labels of documents as arguments of a prior: p(z | source, year). Shapes: B sequences, C covariates."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.contracts import Batch, DocumentInfo, Model, Part
from ltm_pyro.errors import UsageError

UNKNOWN = 0  # the number of a category that is missing, or that the prior does not know


class Covariates:
    """The labels that a prior asks for, and the numbers that it gets for them.

    A prior asks by the arguments of its ``forward`` that have no default, or by an attribute ``covariates`` of names.
    A label with ``levels`` is a category: the prior gets the number of its value, from 1, and `UNKNOWN` (0) where it is
    missing or not among the levels. Any other label is a number, and NaN where it is missing.

    Args:
        prior: whose ``levels`` maps the name of a label to its values.
    """

    def __init__(self, prior: Any) -> None:
        asked = getattr(prior, "covariates", None)
        self.names: tuple[str, ...] = _arguments(prior) if asked is None else tuple(asked)
        self.levels: Mapping[str, Sequence[Any]] = getattr(prior, "levels", {})

    def encode(self, documents: Sequence[DocumentInfo | None]) -> Float[Tensor, "B C"]:
        """The numbers of each sequence's document; those of a missing label where there is none."""
        rows = [[self._number(name, x) for name in self.names] for x in documents]
        return torch.tensor(rows, dtype=torch.get_default_dtype())

    def _number(self, name: str, document: DocumentInfo | None) -> float:
        value = None if document is None else document.labels.get(name)
        if name in self.levels:
            levels = [*self.levels[name]]
            return float(levels.index(value) + 1 if value in levels else UNKNOWN)
        if value is None:
            return math.nan
        if isinstance(value, str):
            raise UsageError(
                f"The prior asks for the label '{name}', which has the value {value!r} and no `levels`: give the prior "
                f"the values that it knows, levels = {{'{name}': [{value!r}, …]}}; only numbers need none."
            )
        return float(value)

    def arguments(
        self, covariates_BC: Float[Tensor, "B C"] | None, size: int, device: torch.device
    ) -> dict[str, Tensor]:
        """The arguments of the prior: by name the numbers of all sequences (B,), whole for categories."""
        if not self.names:
            return {}
        if covariates_BC is None:
            covariates_BC = self.encode([None] * size).to(device)
        columns = covariates_BC.unbind(-1)
        return {name: x.long() if name in self.levels else x for name, x in zip(self.names, columns, strict=True)}


def _arguments(prior: Any) -> tuple[str, ...]:
    """The arguments of a prior's forward that have no default."""
    function = prior.forward if isinstance(prior, torch.nn.Module) else prior
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return tuple(x.name for x in parameters if x.kind in kinds and x.default is x.empty)


def documents_of(batch: Batch) -> list[DocumentInfo | None]:
    """The document of each sequence; None where it is not known, or a row has several with different labels."""
    rows = batch.parts or [()] * batch.size
    found = [[part.document for part in row] for row in rows]
    return [row[0] if row and all(x.labels == row[0].labels for x in row) else None for row in found]


def with_labels(batch: Batch, labels: Sequence[Mapping[str, Any]]) -> Batch:
    """The batch with the labels of each sequence's document, for texts that come without a pack."""
    parts = ((Part(n, None, 0, DocumentInfo(n, labels=each)),) for n, each in enumerate(labels))
    return batch._replace(parts=tuple(parts), covariates_BC=None)


def covariates_of(model: Model, batch: Batch) -> Float[Tensor, "B C"] | None:
    """What the model's prior is told of each sequence; None if it asks for nothing."""
    if batch.covariates_BC is not None:
        return batch.covariates_BC
    find: Any = getattr(model, "covariates_of", None)
    found: Float[Tensor, "B C"] | None = find and find(batch)
    return found


def prior_arguments(model: Model, batch: Batch) -> tuple[Any, ...]:
    """The arguments of ``sample_prior`` for the sequences of a batch."""
    covariates_BC = covariates_of(model, batch)
    return (batch.size,) if covariates_BC is None else (batch.size, covariates_BC)
