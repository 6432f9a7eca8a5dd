"""What an evaluation says of each document, and of documents whose exact −log p(x) is known.

Shapes: B sequences.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltm_pyro.contracts import DocumentInfo
from ltm_pyro.data.make import BEST_WITHIN
from ltm_pyro.data.manifest import is_pack, read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.scores import Evaluation, Rate, rate_of
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.files import atomic_write
from ltm_pyro.utils.statistics import Estimate, clustered_ratio


class DocumentScore(NamedTuple):
    """A document's figures: the sums over its pieces, in nats; ``pieces`` counts the rows of it that were scored.

    ``cut`` says that these are not all of its rows.
    """

    document: DocumentInfo
    pieces: int
    cut: bool
    tokens: int
    bytes: int
    nats: dict[str, float]  # by estimator
    kl: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """One flat object: join it with the input on ``id``."""
        info = self.document
        exact = {} if info.exact_nats is None else {"exact_nats": info.exact_nats}
        figures = {f"{name}_nats": x for name, x in self.nats.items()} | {f"{n}_kl": x for n, x in self.kl.items()}
        found = {"id": info.id, "file": info.file, "labels": dict(info.labels)}
        counts = {"pieces": self.pieces, "cut": self.cut, "tokens": self.tokens, "bytes": self.bytes}
        return found | counts | exact | figures


def check_documents(place: str) -> None:
    """Raises `UsageError` before anything is scored if the rows of a pack do not know their documents."""
    if is_pack(place):
        read_manifest(place).need_documents(place, "A figure for each document")


def document_scores(evaluation: Evaluation) -> list[DocumentScore]:
    """The figures of every document that was scored, in the order of the corpus."""
    rows = evaluation.rows
    pieces = rows and rows.pieces
    if rows is None or pieces is None:
        raise UsageError(
            "These rows do not know their documents, because they are cut out of a stream: pack the text again with "
            "--rows documents."
        )
    of: dict[int, list[int]] = {}
    for index, piece in enumerate(pieces):
        of.setdefault(piece.number, []).append(index)
    scores = []
    for number, found in sorted(of.items()):
        cut = evaluation.cut and number == pieces[-1].number
        info = pieces[found[0]].document
        nats = {name: float(result.nats_B[found].sum()) for name, result in rows.scores.items()}
        kl = {name: float(result.kl_B[found].sum()) for name, result in rows.scores.items()}
        tokens, size = (int(x_B[found].sum()) for x_B in (rows.tokens_B, rows.bytes_B))
        scores.append(DocumentScore(info, len(found), cut, tokens, size, nats, kl))
    return scores


Records = Sequence[Mapping[str, Any]]  # `DocumentScore.as_dict` of every document
RECORDS = "documents.json"  # in the folder of a run that was scored to be compared


def write_records(run: Path, records: Records) -> None:
    """Keeps in a run's folder the figures of every document."""
    with atomic_write(run / RECORDS) as new:
        new.write_text(json.dumps(finite(records), ensure_ascii=False), "utf-8", "backslashreplace")


def read_records(run: Path) -> Records:
    """What `write_records` has left there; none if it has not, or on another machine, or if these are other data."""
    try:
        found = json.loads((run / RECORDS).read_text("utf-8")) if (run / RECORDS).is_file() else None
    except (OSError, ValueError, RecursionError):
        return []
    return found if isinstance(found, list) and all(map(_is_record, found)) else []


def _is_record(x: Any) -> bool:
    if not (isinstance(x, dict) and isinstance(x.get("file"), str) and isinstance(x.get("id"), str | int)):
        return False
    nats = [value for name, value in x.items() if name.endswith("_nats")]
    counts = [x.get(name) for name in ("tokens", "bytes")]
    return all(isinstance(n, int) and 0 <= n < 2**53 for n in counts) and all(
        n is None or (isinstance(n, float) or (isinstance(n, int) and abs(n) < 2**53)) for n in nats
    )


def paired(first: Records, second: Records, unit: str = "tokens") -> Records:
    """The documents of ``second`` in the order of ``first``; ids that repeat are paired in the order of the corpus.

    Raises `UsageError` unless both are of the same documents, with as many tokens or bytes.
    """
    known: dict[Any, list[Mapping[str, Any]]] = {}
    for y in reversed(second):
        known.setdefault((y["file"], y["id"]), []).append(y)
    found: list[Mapping[str, Any]] = []
    for x in first:
        same = known.get((x["file"], x["id"]))
        y = same.pop() if same else {}
        if x[unit] != y.get(unit):
            other = f"'{x['id']}' has other {unit}, by another tokenizer or a cut"
            raise UsageError(
                f"Two models are compared on the same documents, but {other}; score both on the same text."
            )
        found.append(y)
    if len(first) != len(second):
        raise UsageError(
            "Two models are compared on the same documents, but one has more of them; score both on the same text."
        )
    return found


def compare(first: Records, second: Records, estimator: str = "bound", unit: str = "tokens") -> Estimate:
    """By how much the first model's figure is above the second's, in nats per token, or bits per byte.

    The one comparison of two models on the same texts, paired document by document. Raises `UsageError`, whose first
    clause is the reason, unless both have that figure of the same documents, with as many tokens or bytes.
    """
    figure = f"{estimator}_nats"
    if any(figure not in x for x in (*first, *second)):
        raise UsageError(f"One of the two models has no {estimator}; compare another figure.")
    pairs = [*zip(first, paired(first, second, unit), strict=True)]
    scored = [(x[unit], x[figure], y[figure]) for x, y in pairs if _is_number(x[figure]) and _is_number(y[figure])]
    if not scored:
        raise UsageError(f"No document has a finite {figure} under both models; there is nothing to compare.")
    if left := len(pairs) - len(scored):
        warnings.warn(
            f"{left} of {len(pairs)} documents have no finite {figure} under both models and are left out.",
            stacklevel=2,
        )
    units_N, first_N, second_N = torch.tensor(scored, dtype=torch.float64).unbind(1)
    return clustered_ratio((first_N - second_N) / (math.log(2) if unit == "bytes" else 1), units_N)


def _is_number(x: float | None) -> bool:
    return x is not None and math.isfinite(x)  # JSON has no infinity: None there


class Exact(NamedTuple):
    """The exact figure of texts that a generator made, and by how much each estimator is above it (paired).

    ``best_within`` is, by r, the least that a model has on average whose tokens see only the r before them and their
    position, where the texts have it as their label ``best_within_r``; ``beyond`` is by how much each estimator is
    above that of the model's own reach: what is below 0 has come through z.
    """

    rate: Rate
    excess: Mapping[str, Rate]
    best_within: Mapping[int, Rate]
    beyond: Mapping[str, Rate]


def exact_figure(evaluation: Evaluation, reach: int | None = None) -> Exact | None:
    """The exact nats per token; None unless −log p(x) of every document is known, and each fills one row.

    Args:
        reach: r of the model, `Run.reach`.
    """
    rows = evaluation.rows
    pieces = rows and rows.pieces
    if rows is None or pieces is None or len({piece.number for piece in pieces}) < len(pieces):
        return None
    known = [x for piece in pieces if (x := piece.document.exact_nats) is not None]
    if len(known) < len(pieces):
        return None
    keep_B = rows.is_finite_B  # the texts of the figures that this is compared with
    tokens_B, labels = rows.tokens_B[keep_B], [piece.document.labels for piece in pieces]
    exact_B, within = torch.tensor(known, dtype=torch.float64)[keep_B], dict[int, Tensor]()
    for name in labels[0]:
        found = re.fullmatch(rf"{BEST_WITHIN}([0-9]{{1,9}})", name)
        values = [each.get(name) for each in labels]
        if found and all(isinstance(x, int | float) for x in values):
            within[int(found[1])] = torch.tensor(values, dtype=torch.float64)[keep_B]

    def above(base_B: Tensor) -> dict[str, Rate]:
        return {name: rate_of(result.nats_B[keep_B] - base_B, tokens_B) for name, result in rows.scores.items()}

    best = {r: rate_of(within[r], tokens_B) for r in sorted(within)}
    return Exact(rate_of(exact_B, tokens_B), above(exact_B), best, above(within[reach]) if reach in within else {})
