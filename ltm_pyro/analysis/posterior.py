"""The class `Posterior`: draws, log-densities and diagnostics of every sequence, with named axes, stored as netCDF.

Its groups have ArviZ's names. Axes: chain, draw, sequence, layer, thought, dim, token.
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
from ltm_pyro.errors import UsageError

THOUGHTS = ("layer", "thought", "dim")
SAMPLES = ("chain", "draw")


@dataclass(frozen=True)
class Posterior:
    """Draws of z given each of N sequences, and what is computed from them.

    ``tree`` has the groups ``posterior`` (``z``, and the prior's other latent sites), ``prior``, ``log_likelihood``
    (``by_token``, ``by_sequence``; nats), ``sample_stats`` (``lp`` = log p(x, z), ``log_prior``, ``log_q`` of every
    draw; ``elbo``, ``iwae``, ``kl``, ``pareto_k``, ``mean``, ``sd``, ``mcse_mean``, ``kl_by_thought`` of every
    sequence), ``observed_data`` (tokens and text), ``constant_data`` (document and labels), ``posterior_predictive``
    (texts generated from draws of z) and ``local``, q's parameters.
    """

    tree: xr.DataTree

    def __post_init__(self) -> None:
        finite = self.z.reduce(lambda x, axis: np.isfinite(x).all(axis), [*SAMPLES, *THOUGHTS]).values
        if not finite.all():
            names = self.group("constant_data")["document"].values[~finite]
            raise UsageError(
                f"The draws of {len(names)} sequences are not finite, first of {names[0]}: the checkpoint is broken "
                f"or the fast rate too high; lower the rate or leave these texts out."
            )

    def group(self, name: str) -> xr.Dataset:
        """One group of the tree."""
        return self.tree.children[name].to_dataset()

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
        """The group ``sample_stats``."""
        return self.group("sample_stats")

    @property
    def texts(self) -> list[str]:
        """The texts as the decoder sees them, decoded from the tokens."""
        return [str(text) for text in self.group("observed_data")["text"].values]

    @property
    def labels(self) -> dict[str, list[str]]:
        """The values of every label by name as strings, one per sequence, empty where one is missing.

        ``document`` is the sequence's document.
        """
        known = self.group("constant_data").data_vars.items()
        return {
            str(name): [
                "" if x != x else f"{x:.15g}" if isinstance(x, float) else str(x) for x in values.values.tolist()
            ]
            for name, values in known
        }

    @property
    def size(self) -> int:
        """N, the number of sequences."""
        return self.z.sizes["sequence"]

    @property
    def tokens(self) -> int:
        """The number of tokens of all sequences together."""
        return int((self.group("observed_data")["tokens"] >= 0).sum())

    @property
    def attrs(self) -> dict[str, Any]:
        """Method, run, seed and version."""
        return {str(name): x for name, x in self.tree.attrs.items()}

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
        if "local" not in self.tree:
            raise UsageError(f"Draws by {self.attrs['method']} have no q: use a posterior of --method guide.")
        return {str(name): torch.from_numpy(x.values.copy()) for name, x in self.group("local").data_vars.items()}

    def select(self, sequences: int | slice | Sequence[int]) -> "Posterior":
        """Some of the sequences."""
        index = [sequences] if isinstance(sequences, int) else sequences
        return Posterior(self.tree.map_over_datasets(lambda x: x.isel(sequence=index, missing_dims="ignore")))

    def to_datatree(self) -> xr.DataTree:
        """The data tree, which ArviZ 1.x accepts."""
        return self.tree

    def to_inferencedata(self) -> Any:
        """The object that the installed ArviZ accepts: `arviz.InferenceData` before 1.0, else the data tree."""
        from ltm_pyro.analysis.arviz import inference_data

        return inference_data(self.tree)

    def save(self, path: str | Path) -> None:
        """Writes netCDF, or zarr if the name ends in ``.zarr``."""
        write_tree(self.tree, path)

    @classmethod
    def load(cls, path: str | Path) -> "Posterior":
        """Reads a file that `save` has written; `UsageError` for other files and other format versions."""
        return cls(read_tree(path, "posterior"))
