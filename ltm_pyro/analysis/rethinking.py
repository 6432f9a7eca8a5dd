"""The drafts of a rethought text as a tree of datasets, which ArviZ takes: iterations are draws."""

import numpy as np
import xarray as xr

from ltm_pyro.text.rethinking import Rethought


def rethinking_tree(found: Rethought) -> xr.DataTree:
    """Groups ``posterior`` (z), ``sample_stats`` (elbo, kl and log_likelihood in nats, accepted) and ``text`` (drafts).

    All have the axes chain and draw: `arviz.rhat` and `arviz.plot_trace` show a loop that is stuck.
    """
    axes = ("chain", "draw")
    stats = {name.removesuffix("_NC"): (axes, x.T) for name, x in found._asdict().items() if name.endswith("_NC")}
    z = found.z_NCLKD.swapaxes(0, 1)
    drafts = np.array(found.drafts, dtype=object).T
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"z": ((*axes, "layer", "thought", "dim"), z)}),
            "sample_stats": xr.Dataset(stats),
            "text": xr.Dataset({"draft": (axes, drafts)}, attrs={"prompt": found.prompt, "kept": found.text}),
        }
    )
