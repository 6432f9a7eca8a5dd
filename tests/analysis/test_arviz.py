"""Files of ours in the hands of ArviZ: each function that docs/analysis.md names, without arguments.

The same tests run under ArviZ 0.23 and 1.x, and take the functions of the version that is installed.
"""

import json
import re
import warnings
from pathlib import Path

import arviz
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from ltm_pyro.analysis import DrawOptions, Posterior, draw_posterior
from ltm_pyro.analysis.arviz import SPLIT
from ltm_pyro.analysis.calibration import Calibration, calibrate
from ltm_pyro.analysis.draw_posterior import draw_batch_posterior
from ltm_pyro.analysis.reference import ChainOptions
from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import LinearGaussianModel

STATISTICS = ["summary", "rhat", "ess", "mcse", "hdi", "extract"]
OF_CHAINS = ["plot_energy", "bfmi", "plot_rank", "plot_parallel"]
if SPLIT:
    STATISTICS += ["eti", "diagnose"]
    OF_CHAINS += ["plot_rank_dist"]
    PLOTS = ["plot_trace", "plot_trace_dist", "plot_forest", "plot_ridge", "plot_dist", "plot_prior_posterior"]
    PLOTS += ["plot_pair", "plot_ess", "plot_ess_evolution", "plot_mcse", "plot_autocorr", "plot_convergence_dist"]
    OF_REPLICAS = ["plot_ppc_dist", "plot_ppc_pit", "plot_ppc_interval", "plot_ppc_tstat"]
else:
    PLOTS = ["plot_trace", "plot_forest", "plot_posterior", "plot_density", "plot_violin", "plot_dist_comparison"]
    PLOTS += ["plot_pair", "plot_ess", "plot_mcse", "plot_autocorr"]
    OF_REPLICAS = ["plot_ppc", "plot_bpv"]
THEIRS = (  # what the functions warn of themselves, in these versions
    "Passing a dict or None as alias_mapping",
    "num_samples is larger than the number",
    "look binary",
    "Your data appears to have a single value",
)


def complaints(data, names, **arguments):
    """What goes wrong when functions of ArviZ get data and nothing else."""
    found = {}
    for name in names:
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                getattr(arviz, name)(data, **arguments)
            new = {str(x.message) for x in said if not any(words in str(x.message) for words in THEIRS)}
            if new:
                found[name] = new
        except Exception as error:
            found[name] = repr(error)
        plt.close("all")
    return found


@pytest.fixture
def of_texts(tiny_run, tmp_path):
    run = tiny_run(layers=1, thoughts=1, thought_width=2)
    texts = ["the old model reads", "short words about time", "a long text"]
    posterior = draw_posterior(run, texts, DrawOptions(samples=60, replicas=8), longer="cut")
    replicas = posterior.tree["posterior_predictive"]
    random = np.random.default_rng(0)  # an untrained model writes texts of one length, and 0.23 plots no constant
    for name, x in replicas.data_vars.items():
        replicas[name] = x + 0.1 * random.normal(size=x.shape)
    posterior.save(tmp_path / "texts.nc")
    return tmp_path / "texts.nc"


@pytest.fixture
def of_chains(tmp_path):
    model = LinearGaussianModel(ThoughtShape(1, 1, 2), length=3)
    options = DrawOptions(method="nuts", samples=40, chains=ChainOptions(chains=4, warmup=30))
    found = draw_batch_posterior(model, MeanField(model), model.sample_batch(2), LocalInference(), options)
    found.tree["sample_stats"]["diverging"][0, :2] = True  # `plot_parallel` of 1.3 fails where one draw alone diverges
    found.save(tmp_path / "chains.nc")
    return tmp_path / "chains.nc"


def test_draws_of_q(of_texts):
    posterior = Posterior.load(of_texts)
    names = [*STATISTICS, *PLOTS, *OF_REPLICAS]
    assert complaints(posterior.to_inferencedata(), names) == {}
    from_file = arviz.from_netcdf(of_texts)
    whole = [name for name in names if name != "plot_dist_comparison"]  # the file has the prior once, for all sequences
    assert complaints(from_file, whole) == {}
    joined(from_file, posterior)
    assert complaints(posterior.select(np.int64(1)).to_inferencedata(), ["summary", "plot_forest", *OF_REPLICAS]) == {}


def test_chains(of_chains, tmp_path):
    posterior = Posterior.load(of_chains)
    assert complaints(posterior.to_inferencedata(), [*STATISTICS, *PLOTS, *OF_CHAINS]) == {}
    joined(arviz.from_netcdf(of_chains), posterior)
    stats = posterior.group("sample_stats")
    assert {"lp", "energy", "diverging", "tree_depth", "acceptance_rate"} <= set(stats)
    assert {x.dims for x in stats.values()} == {("chain", "draw")}
    one = posterior.select([1])
    np.testing.assert_allclose(one.group("sample_stats")["energy"], posterior.stats["energy"].sel(sequence=1))
    np.testing.assert_allclose(stats["energy"], posterior.stats["energy"].sum("sequence"))
    (tmp_path / "copy").mkdir()
    one.save(tmp_path / "copy" / "one.nc")
    assert complaints(arviz.from_netcdf(tmp_path / "copy" / "one.nc"), ["bfmi", "plot_energy"]) == {}


def joined(data, posterior):
    """Two files as chains of one, and (0.23) as JSON."""
    if SPLIT:
        both = xr.concat(
            [data, data], dim="chain", data_vars="minimal", coords="minimal", compat="override", join="exact"
        )
        assert both["posterior"].sizes["chain"] == 2 * posterior.z.sizes["chain"]
        return
    both = arviz.concat(data, data, dim="chain")
    assert both.posterior.sizes["chain"] == 2 * posterior.z.sizes["chain"]
    assert both.sample_stats.sizes["chain"] == both.posterior.sizes["chain"]


@pytest.mark.skipif(SPLIT, reason="ArviZ 1.x writes no JSON")
def test_json(of_texts, tmp_path):
    data = Posterior.load(of_texts).to_inferencedata()
    for name, found in {"object": data, "file": arviz.from_netcdf(of_texts)}.items():
        found.to_json(tmp_path / f"{name}.json")
        written = json.loads((tmp_path / f"{name}.json").read_text())  # 0.23's own from_json mixes up the axes
        np.testing.assert_allclose(written["posterior"]["z"], data.posterior["z"], rtol=1e-6)


def test_what_the_attributes_say(of_texts, of_chains):
    attrs = Posterior.load(of_texts).tree["posterior"].attrs
    assert {
        "inference_library": "ltm_pyro",
        "method": "guide",
        "guide": "MeanField",
        "steps": "3",
    }.items() <= attrs.items()
    attrs = Posterior.load(of_chains).tree["posterior"].attrs
    assert attrs["kernel"].startswith("NUTS of Pyro")
    assert "guide" not in attrs
    assert attrs["warmup"] == "30"


def test_no_harmonic_mean_is_offered_as_evidence(of_texts):
    """The likelihood at draws of q is nowhere where `loo` would take it for one of leaving a text out."""
    data = Posterior.load(of_texts).to_inferencedata()
    assert "log likelihood not found" in complaints(data, ["loo"])["loo"]


def test_compare_ranks_by_our_evidence(exact, posterior):
    model, worse = (LinearGaussianModel(ThoughtShape(2, 1, 3), noise=noise) for noise in (0.5, 1.0))
    batch = model.sample_batch(40)
    found = {name: posterior(x, exact(x), batch, 100) for name, x in {"true": model, "worse": worse}.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas warns of how ArviZ 0.23 calls it
        whole = {"round_to": "none"} if SPLIT else {}  # 1.x rounds to what the error allows
        table = arviz.compare({name: x.elpd() for name, x in found.items()}, **whole)
    assert [*table.index] == ["true", "worse"]
    evidence = model.log_evidence(batch).sum() - worse.log_evidence(batch).sum()
    assert abs(table["elpd_diff"].iloc[1]) == pytest.approx(evidence.item(), rel=0.1)
    assert "elpd_loo" in str(found["true"].elpd())


@pytest.mark.skipif(not SPLIT, reason="in 0.23 it takes arrays")
def test_the_ecdf_of_a_calibration(known, exact, simulate, tmp_path):
    found = calibrate(known, exact(known), LocalInference(steps=0), simulate(known), simulations=40, samples=19)
    found.save(tmp_path / "calibration.nc")
    assert complaints(arviz.from_netcdf(tmp_path / "calibration.nc"), ["plot_ecdf_pit"]) == {}
    assert Calibration.load(tmp_path / "calibration.nc").p_value() == found.p_value()


def test_the_document_names_these_functions():
    text = (Path(__file__).resolve().parents[2] / "docs" / "analysis.md").read_text("utf-8")
    named = {*re.findall(r"`(\w+)`", text.split("<!-- arviz -->")[1].split("<!-- end of arviz -->")[0])}
    assert {*STATISTICS, *PLOTS, *OF_REPLICAS, *OF_CHAINS} <= named
