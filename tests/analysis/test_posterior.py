"""The class `Posterior`: known answers, selection, storage, and conversion for ArviZ."""

import warnings

import arviz
import numpy as np
import pytest
import xarray as xr

from ltm_pyro.analysis import Posterior
from ltm_pyro.analysis.draw_posterior import DrawOptions, draw_batch_posterior
from ltm_pyro.analysis.model_comparison import evidence_records
from ltm_pyro.analysis.posterior import SEQUENCES, TEXT
from ltm_pyro.analysis.reference import ChainOptions
from ltm_pyro.analysis.sections import ReportInputs, sections
from ltm_pyro.analysis.storage import write_tree
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import Langevin, MeanField, Point
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import EnergyPrior, HierarchicalPrior


@pytest.fixture
def right(known, exact, posterior):
    batch = known.sample_batch(5)
    return batch, posterior(known, exact(known), batch)


def test_draws_and_densities_meet_the_truth(known, right):
    batch, found = right
    truth, evidence_B = known.posterior(batch), known.log_evidence(batch).numpy()
    draws = found.draws
    assert draws.dims == ("sequence", "draw", "coordinate")
    error = (draws.mean("draw") - truth.mean_BN.numpy()) / truth.covariance_BNN.diagonal(
        dim1=-2, dim2=-1
    ).sqrt().numpy()
    assert abs(error).max() < 4.5 / 400**0.5
    np.testing.assert_allclose(found.log_weights().values[0], np.broadcast_to(evidence_B, (400, 5)), atol=1e-6)
    np.testing.assert_allclose(found.stats.elbo, evidence_B, atol=1e-6)
    np.testing.assert_allclose(found.stats.iwae, evidence_B, atol=1e-6)
    by_token = found.group(TEXT)["log_likelihood"].sum("token")
    np.testing.assert_allclose(by_token, found.stats["log_likelihood"])


def test_k_hat_trusts_the_exact_family_and_not_a_factorised_one(known, exact, posterior):
    batch = known.sample_batch(5)
    assert (posterior(known, exact(known), batch).stats.pareto_k < 0.7).all()
    correlated = type(known)(known.prior.shape, length=3, noise=0.05)
    batch = correlated.sample_batch(5)
    assert (posterior(correlated, exact(correlated, diagonal=True), batch, 2000).stats.pareto_k > 0.7).all()


def test_the_kl_of_each_thought_sums_to_the_kl_where_q_factorises(known, posterior):
    batch = known.sample_batch(3)
    found = posterior(known, MeanField(known), batch, 2000, LocalInference(steps=100, rate=0.1))
    stderr = (found.stats.log_q - found.stats.log_prior).std(("chain", "draw")) / 2000**0.5
    assert (abs(found.stats.kl_by_thought.sum(("layer", "thought")) - found.stats.kl) < 4 * stderr).all()
    local = found.local()
    np.testing.assert_allclose(found.stats["mean"], local["z_loc"])
    np.testing.assert_allclose(found.stats["sd"], (local["z_log_var"] / 2).exp())


@pytest.mark.parametrize("name", ["posterior.nc", "posterior.zarr"])
def test_it_comes_back_from_disk(right, tmp_path, name):
    _, found = right
    found.save(tmp_path / name)
    found.save(tmp_path / name)  # replaces the first
    again = Posterior.load(tmp_path / name)
    xr.testing.assert_identical(again.tree["posterior"].to_dataset(), found.tree["posterior"].to_dataset())
    assert again.attrs == found.attrs
    assert again.labels == found.labels
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_some_sequences(right):
    _, found = right
    some = found.select([3, 1])
    assert some.size == 2
    assert some.labels["document"] == ["sequence:3", "sequence:1"]
    np.testing.assert_array_equal(some.z.sel(sequence=3), found.z.isel(sequence=3))
    assert some.local()["z_loc"].shape[0] == 2
    assert found.select(0).z.sizes["sequence"] == 1


def test_arviz_reads_it(right, tmp_path):
    _, found = right
    found.save(tmp_path / "posterior.nc")
    for data in (found.to_inferencedata(), arviz.from_netcdf(tmp_path / "posterior.nc")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ArviZ warns that R-hat needs two chains; draws of q have one
            table = arviz.summary(data, var_names=["z"], kind="stats")
            arviz.plot_forest(data, var_names=["z"], backend_kwargs={"layout": "constrained"})
        assert len(table) == 5 * 6
        assert {"posterior", "prior", "sample_stats", "observed_data"} <= set(data.groups())


def test_chains_take_the_sequences_one_by_one(known):
    batch = known.sample_batch(3)
    options = DrawOptions(method="langevin", samples=25, chains=ChainOptions(warmup=5))
    found = draw_batch_posterior(known, MeanField(known), batch, LocalInference(steps=0), options)
    assert found.z.shape == (2, 25, 3, 2, 1, 3)
    assert found.labels["document"] == [f"sequence:{index}" for index in range(3)]
    assert (found.group(TEXT)["tokens"].values == batch.targets_BT.numpy()).all()
    assert found.attrs["method"] == "langevin"


def test_files_that_are_no_posterior(right, tmp_path):
    _, found = right
    (tmp_path / "text.nc").write_text("hello")
    xr.Dataset({"x": 1.0}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    old = found.tree.copy()
    old.attrs["ltm_pyro_posterior"] = 99
    write_tree(old, tmp_path / "old.nc")
    for name, words in {"no.nc": "no posterior at", "text.nc": "cannot be read", "other.nc": "not a posterior"}.items():
        with pytest.raises(UsageError, match=words):
            Posterior.load(tmp_path / name)
    with pytest.raises(UsageError, match="format 99, and this version reads 2"):
        Posterior.load(tmp_path / "old.nc")


@pytest.mark.parametrize("name", ["q.nc", "q.zarr"])
def test_a_file_from_which_something_was_taken_away(right, tmp_path, name):
    _, found = right
    found.save(tmp_path / name)
    whole = Posterior.load(tmp_path / name)
    for group in ("posterior", SEQUENCES, TEXT, "constant_data"):
        for variable in whole.group(group).data_vars:
            engine = {"engine": "zarr", "consolidated": False} if name.endswith("zarr") else {"engine": "h5netcdf"}
            with xr.open_datatree(tmp_path / name, **engine) as stored:
                tree = stored.load()
            tree[group] = tree[group].to_dataset().drop_vars(variable)
            if name.endswith("zarr"):
                tree.to_zarr(tmp_path / f"cut-{name}", mode="w", consolidated=False)
            else:
                tree.to_netcdf(tmp_path / f"cut-{name}", engine="h5netcdf")
            with pytest.raises(UsageError, match=f"has no /{group}/{variable}, which was there when it was written"):
                Posterior.load(tmp_path / f"cut-{name}")


def test_draws_that_are_not_finite(right, tmp_path):
    _, found = right
    found.z[0, 0, 2] = np.nan
    with pytest.raises(UsageError, match="1 sequences are not finite, first of sequence:2"):
        Posterior(found.tree)


def test_too_few_draws():
    with pytest.raises(UsageError, match="25 samples, got 10"):
        DrawOptions(samples=10)


@pytest.mark.parametrize(("guide", "found"), [(MeanField, {"log_q", "pareto_k"}), (Point, set()), (Langevin, set())])
def test_what_is_no_bound_is_not_called_one(tiny_model, tiny_batch, guide, found):
    """With an unnormalised prior only k-hat is left, which needs no constant; without a density of q nothing is."""
    model = tiny_model()
    model.prior = EnergyPrior(model.decoder.thought_shape, width=8, steps=2)
    result = draw_batch_posterior(
        model, guide(model), tiny_batch(), LocalInference(steps=2, rate=0.01), DrawOptions(samples=25)
    )
    assert {"log_q", "pareto_k", "elbo", "iwae", "kl"} & set(result.stats.data_vars) == found
    assert ("kl_by_thought" in result.stats) == guide.has_density
    with pytest.raises(UsageError, match="has no bound"):
        evidence_records(result)
    _, trust = next(iter(sections(ReportInputs(result))))
    assert "ELBO" not in trust.verdict
    assert ("no density q" in trust.verdict) != guide.has_density


@pytest.mark.parametrize("name", ["folder", "folder.zarr"])
def test_a_folder_is_not_replaced(right, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is a folder"):
        right[1].save(tmp_path / name)
    assert (tmp_path / name / "thesis.txt").exists()


def test_the_priors_moments_follow_the_seed(known):
    """They are estimated from draws where they are not known; q stays at its initial value without a fast step."""
    known.prior = HierarchicalPrior(known.prior.shape)
    batch, kl = known.sample_batch(2), []
    for seed in (0, 1, 1):
        made = draw_batch_posterior(
            known, MeanField(known), batch, LocalInference(steps=0), DrawOptions(samples=25), seed=seed
        )
        kl.append(made.stats.kl_by_thought.values)
    assert abs(kl[0] - kl[1]).max() > 1e-6
    np.testing.assert_array_equal(kl[1], kl[2])
