"""The class `Posterior`: draws, log-densities and diagnostics of every sequence, with named axes, stored as netCDF.

Groups that ArviZ knows have its names and hold what it can use; everything else is below ``ltm_pyro``. Axes: chain,
draw, sequence, layer, thought, dim, token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from ltm_pyro.analysis.storage import read_tree, write_tree
from ltm_pyro.contracts import LocalParameters
from ltm_pyro.data.documents import Label
from ltm_pyro.errors import UsageError

SEQUENCES, TEXT, LOCAL = "ltm_pyro/sequences", "ltm_pyro/text", "ltm_pyro/local"  # groups that ArviZ does not know
COMPLETE = "complete"  # in the group ltm_pyro of a store that is written in blocks: which of them are there
THOUGHTS = ("layer", "thought", "dim")
SAMPLES = ("chain", "draw")


@dataclass(frozen=True)
class Posterior:
    """Draws of z given each of N sequences, and what is computed from them.

    ``tree`` has the groups of ArviZ: ``posterior`` (``z``, and the prior's other latent sites), ``prior``,
    ``sample_stats`` (of every draw, all sequences together: see `totals`), ``observed_data`` and
    ``posterior_predictive`` (statistics of the texts, and of texts generated from draws of z), and ``constant_data``
    (document and labels). In ``ltm_pyro`` are ``sequences`` (`stats`), ``text`` (tokens, text, log-likelihood by token)
    and ``local``, q's parameters.
    """

    tree: xr.DataTree

    def __post_init__(self) -> None:
        finite = xr.apply_ufunc(np.isfinite, self.stats["mean"]).all(THOUGHTS).values
        if self.has("posterior"):
            finite &= self.z.reduce(lambda x, axis: np.isfinite(x).all(axis), [*SAMPLES, *THOUGHTS]).values
        if not finite.all():
            names = self.group("constant_data")["document"].values[~finite]
            raise UsageError(
                f"The draws of {len(names)} sequences are not finite, first of {names[0]}: the checkpoint is broken "
                f"or the fast rate too high; lower the rate or leave these texts out."
            )

    def has(self, name: str) -> bool:
        """Whether there is a group of that name."""
        return f"/{name}" in self.tree.groups

    def group(self, name: str) -> xr.Dataset:
        """One group of the tree; `UsageError` if it has been left out."""
        if not self.has(name):
            raise UsageError(
                f"This posterior was stored without the group {name}: draw it again without leaving it out."
            )
        return self.tree[name].to_dataset()

    @property
    def z(self) -> xr.DataArray:
        """The draws of the thoughts: chain, draw, sequence, layer, thought, dim."""
        return self.group("posterior")["z"]

    @property
    def draws(self) -> xr.DataArray:
        """The draws of all chains concatenated: sequence, draw, coordinate (layer, thought and dim flattened)."""
        flat = self.z.stack(sample=SAMPLES, coordinate=THOUGHTS, create_index=False)
        return flat.drop_vars(SAMPLES).rename(sample="draw").transpose("sequence", "draw", "coordinate")

    @property
    def stats(self) -> xr.Dataset:
        """Figures of every sequence, in nats.

        Of every draw ``lp`` = log p(x, z), ``log_prior``, ``log_likelihood`` and ``log_q``; of the sequence ``elbo``,
        ``iwae``, ``kl``, ``pareto_k``, ``mean``, ``sd``, ``mcse_mean``, ``kl_by_thought``, and ``elbo_by_step`` and
        ``kl_by_step`` of the fast steps; for chains also how they went (`ltm_pyro.analysis.reference.ChainDraws`).
        """
        return self.group(SEQUENCES)

    @property
    def texts(self) -> list[str]:
        """The texts as the decoder sees them, decoded from the tokens."""
        return [str(text) for text in self.group(TEXT)["text"].values]

    @property
    def replicas(self) -> np.ndarray | None:
        """The texts that were written from draws of q, (replica, sequence); None if there are none."""
        texts = self.group(TEXT)
        return texts["replica_text"].values if "replica_text" in texts else None

    @property
    def rows(self) -> list[np.ndarray]:
        """The tokens of each sequence."""
        return [row[row >= 0].astype(np.int64) for row in self.group(TEXT)["tokens"].values]

    @property
    def labels(self) -> dict[str, list[Label]]:
        """The values of every label by name, numbers as numbers, one per sequence; None where one is missing.

        ``document`` is the sequence's document.
        """
        found: dict[str, list[Label]] = {}
        for name, values in self.group("constant_data").data_vars.items():
            whole = values.attrs.get("whole", 0)  # numbers that were whole, stored as floats because some are missing
            known = [None if x == "" or x != x else int(x) if whole else x for x in values.values.tolist()]
            found[str(name)] = known
        return found

    @property
    def documents(self) -> np.ndarray:
        """The document of each sequence: what standard errors are clustered by."""
        return np.array([str(x) for x in self.group("constant_data")["document"].values])

    @property
    def size(self) -> int:
        """N, the number of sequences."""
        return self.stats.sizes["sequence"]

    @property
    def tokens(self) -> int:
        """The number of tokens of all sequences together."""
        return int((self.group(TEXT)["tokens"] >= 0).sum())

    @property
    def attrs(self) -> dict[str, Any]:
        """Method, run, seed and version; in the file all are strings, which ArviZ can write as JSON."""
        return {str(name): int(x) if str(x).isdecimal() else x for name, x in self.tree.attrs.items()}

    def log_weights(self) -> xr.DataArray:
        """The stored draws' log importance weights log p(x, z) − log q(z | x), in nats; `UsageError` without log q."""
        if "log_q" not in self.stats:
            raise UsageError("The draws have no density q: infer with a guide that has one (--method guide).")
        return self.stats.lp - self.stats.log_q

    def check_normalised(self) -> None:
        """`UsageError` unless log p(z) and log q(z | x) are known without an unknown constant."""
        if "kl" not in self.stats:
            raise UsageError(
                "This posterior has no bound, because its draws have no density q or its prior no known normaliser: "
                "infer with another guide or prior."
            )

    def local(self) -> LocalParameters:
        """q's parameters by name, each with leading axis N; a fit can be continued from them."""
        if not self.has(LOCAL):
            raise UsageError(f"Draws by {self.attrs['method']} have no q: use a posterior of --method guide.")
        return {str(name): torch.from_numpy(x.values.copy()) for name, x in self.group(LOCAL).data_vars.items()}

    def select(self, sequences: int | np.integer | slice | Sequence[int] | np.ndarray) -> "Posterior":
        """Some of the sequences, by number."""
        index = sequences if isinstance(sequences, slice) else np.atleast_1d(np.asarray(sequences))
        tree = self.tree.map_over_datasets(lambda x: x.isel(sequence=index, missing_dims="ignore"))
        if self.has("sample_stats"):
            attrs = tree["sample_stats"].attrs
            tree["sample_stats"] = xr.DataTree(totals(tree[SEQUENCES].to_dataset()).assign_attrs(attrs))
        return Posterior(tree)

    def to_datatree(self) -> xr.DataTree:
        """The data tree, which ArviZ 1.x accepts."""
        return self.tree

    def to_inferencedata(self) -> Any:
        """The object that the installed ArviZ accepts: `arviz.InferenceData` before 1.0, else the data tree."""
        from ltm_pyro.analysis.arviz import inference_data

        return inference_data(self.tree)

    def elpd(self, estimator: str = "iwae") -> Any:
        """`arviz.ELPDData` of the evidence of each document, for `arviz.compare` (`model_comparison.elpd`)."""
        from ltm_pyro.analysis.model_comparison import elpd

        return elpd(self, estimator)

    def save(self, path: str | Path) -> None:
        """Writes netCDF, or zarr if the name ends in ``.zarr``."""
        write_tree(self.tree, path)

    @classmethod
    def load(cls, path: str | Path) -> "Posterior":
        """Reads a file of `save` or a complete store of `ltm posterior --stream`; `UsageError` for others."""
        tree = read_tree(path, "posterior")
        blocks = tree["ltm_pyro"].to_dataset().get(COMPLETE)
        if blocks is not None and not (done := blocks.values).all():
            raise UsageError(
                f"{path} has {int(done.sum())} of {len(done)} blocks: repeat the command that writes it, which goes on."
            )
        if "posterior" in tree.children and "sample_stats" not in tree.children:
            tree["sample_stats"] = xr.DataTree(totals(tree[SEQUENCES].to_dataset()))
        return cls(tree)


TOTALS = dict.fromkeys(("lp", "log_prior", "log_q", "energy"), "sum")  # `az.loo` would take a log_likelihood
TOTALS |= {"diverging": "any", "tree_depth": "max", "acceptance_rate": "mean"}


def totals(sequences: xr.Dataset) -> xr.Dataset:
    """ArviZ's ``sample_stats``, whose variables have the axes chain and draw alone.

    Sequences are independent, so that a draw of all of them has the sum of their log-densities and energies. It has
    diverged if one of them has; its tree depth is the deepest, its acceptance rate the average.
    """
    return xr.Dataset({n: getattr(sequences[n], how)("sequence") for n, how in TOTALS.items() if n in sequences})
