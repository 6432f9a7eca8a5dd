"""Thoughts as embeddings: a Parquet table, and the texts nearest to a new one with the posterior's uncertainty.

Shapes: N sequences, S draws, D coordinates.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.analysis.probes import means
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.extras import extra
from ltm_pyro.utils.files import atomic_write, writing

DRAWS = 200  # of every q, to say how often each text is the nearest


def write_embeddings(parts: Iterable[Posterior], path: Path) -> int:
    """Writes one Parquet table of posteriors, part by part, and returns its rows.

    A row is a sequence: ``id`` (its document), ``mean`` and ``sd`` of z as lists of D numbers (layer, thought and dim
    flattened), ``text``, its figures ``elbo``, ``kl`` and ``pareto_k``, and the labels, numbers as numbers. The shape
    (layers, thoughts, width) is in the table's metadata under ``thoughts``. A label called like one of these columns
    gets ``label_`` before its name.
    """
    arrow = extra("pyarrow", "parquet", "A table of embeddings")
    parquet = extra("pyarrow.parquet", "parquet", "A table of embeddings")
    rows, writer = 0, None
    with writing(path, "--embeddings"), atomic_write(path) as new:
        try:
            for part in parts:
                table = _table(arrow, part)
                writer = writer or parquet.ParquetWriter(new, table.schema)
                writer.write_table(table.cast(writer.schema))
                rows += table.num_rows
        finally:
            if writer:
                writer.close()
    return rows


def _table(arrow: Any, posterior: Posterior) -> Any:
    stats, lists = posterior.stats, arrow.list_(arrow.float32(), means(posterior).shape[1])
    flat = {name: stats[name].values.reshape(posterior.size, -1).astype(np.float32) for name in ("mean", "sd")}
    columns = {"id": arrow.array(posterior.documents.tolist())}
    for name, x_ND in flat.items():
        columns[name] = arrow.FixedSizeListArray.from_arrays(arrow.array(x_ND.ravel()), type=lists)
    columns["text"] = arrow.array(posterior.texts)
    for name in ("elbo", "kl", "pareto_k"):
        if name in stats:
            columns[name] = arrow.array(stats[name].values.astype(float))
    kinds = posterior.group("constant_data")  # one type for all parts, also where all values of a part are missing
    labels = posterior.labels
    for name, values in labels.items():
        if name != "document":
            of_text = kinds[name].dtype.kind not in "iuf"
            whole = not of_text and (kinds[name].dtype.kind in "iu" or kinds[name].attrs.get("whole", 0))
            kind = arrow.string() if of_text else arrow.int64() if whole else arrow.float64()
            column = name
            while column in columns or (column != name and column in labels):  # it is ours, or another label's
                column = f"label_{column}"
            columns[column] = arrow.array(values, kind)
    shape = ",".join(str(stats["mean"].sizes[axis]) for axis in ("layer", "thought", "dim"))
    return arrow.table(columns).replace_schema_metadata({"thoughts": shape})


class Near(NamedTuple):
    """A known sequence, its distance from a new text in prior sd, and how often it is the nearest of all.

    ``distance`` is the root of the expected squared distance of draws from both q, so that vague thoughts are far from
    everything; ``probability`` is the share of draws in which no other sequence is nearer.
    """

    sequence: int
    distance: float
    probability: float


def nearest(known: Posterior, new: Posterior, count: int = 5, seed: int = 0) -> list[list[Near]]:
    r"""The sequences of ``known`` that are nearest to each sequence of ``new``, both inferred under the same run.

    .. math:: d(x, x_i)^2 = E \Vert z - z_i \Vert^2 = \Vert \mu - \mu_i \Vert^2 + \textstyle\sum (\sigma^2 + \sigma_i^2)

    in prior standard deviations, with z ~ q(z | x) and z_i ~ q(z | x_i) independent. The probabilities are from draws
    of Gaussians with these moments.
    """
    if known.stats["mean"].shape[1:] != new.stats["mean"].shape[1:]:
        raise UsageError("The two posteriors have thoughts of different shapes: infer both under the same run.")
    if len({x.attrs["weights"] for x in (known, new) if "weights" in x.attrs}) > 1:
        raise UsageError(
            "The two posteriors are of different models, whose thoughts have nothing to do with each other."
        )
    scale_D = known.group("prior")["z"].std(("chain", "draw")).values.ravel()
    means_ND, sds_ND = means(known) / scale_D, known.stats["sd"].values.reshape(known.size, -1) / scale_D
    random, found = np.random.default_rng(seed), []
    for mean_D, sd_D in zip(means(new) / scale_D, new.stats["sd"].values.reshape(new.size, -1) / scale_D, strict=True):
        distance_N = (((means_ND - mean_D) ** 2 + sds_ND**2).sum(1) + (sd_D**2).sum()) ** 0.5
        share_N = _how_often(means_ND, sds_ND, mean_D, sd_D, random)
        order = distance_N.argsort(kind="stable")[:count]
        found.append([Near(int(n), float(distance_N[n]), float(share_N[n])) for n in order])
    return found


def _how_often(
    means_ND: Float[np.ndarray, "N D"],
    sds_ND: Float[np.ndarray, "N D"],
    mean_D: Float[np.ndarray, " D"],
    sd_D: Float[np.ndarray, " D"],
    random: np.random.Generator,
) -> Float[np.ndarray, " N"]:
    """How often each of N sequences is the nearest to a draw."""
    winners = [
        (((means_ND + sds_ND * random.standard_normal(means_ND.shape)) - z_D) ** 2).sum(1).argmin()
        for z_D in mean_D + sd_D * random.standard_normal((DRAWS, len(mean_D)))
    ]
    return np.bincount(winners, minlength=len(means_ND)) / DRAWS
