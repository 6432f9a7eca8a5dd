"""What a report says of a q that is right, and of planted faults: both often, with many repeats."""

import numpy as np
import pytest
import torch
import xarray as xr

from ltm_pyro.analysis import sections
from ltm_pyro.analysis.against_reference import largest_r_hat
from ltm_pyro.analysis.calibration import calibrate
from ltm_pyro.analysis.information import aggregate, decompose
from ltm_pyro.analysis.posterior import SAMPLES, SEQUENCES, TEXT, Posterior
from ltm_pyro.analysis.reference import convergence
from ltm_pyro.analysis.report import _headline_figures
from ltm_pyro.analysis.sections import ReportInputs, predictive
from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import LinearGaussianModel

REPEATS = [pytest.param(8, id="few"), pytest.param(100, id="many", marks=pytest.mark.slow)]
JUDGED = ("trust", "calibration", "reference", "aggregated", "predictive")
TEXTS, COMPARED, CHAINS = 60, 3, 4


def with_replicas(found, model, batch, z_RBLKD):
    """A posterior and one text from each of some draws; values are coarse tokens, so that statistics differ."""
    with torch.no_grad():
        drawn = [model.sample_tokens(z_BLKD) for z_BLKD in z_RBLKD]
    coarse = [x.targets_BT.numpy() // 100 for x in (batch, *drawn)]
    tree = found.tree.copy()
    axes = ("replica", "sequence", "replica_token")
    tree[TEXT] = found.group(TEXT).assign(tokens=(("sequence", "token"), coarse[0]))
    tree[TEXT] = tree[TEXT].to_dataset().assign(replica_tokens=(axes, np.stack(coarse[1:])))
    return Posterior(tree)


def as_chains(found, samples):
    """Independent draws in the form of Markov chains that have converged."""
    z = found.z.transpose(*SAMPLES, "sequence", "layer", "thought", "dim").values
    shaped = z.reshape(CHAINS, samples // CHAINS, *z.shape[2:])
    rows = [convergence(torch.from_numpy(shaped[:, :, [n]])) for n in range(shaped.shape[2])]
    diagnostics = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    axes = ("sequence", "layer", "thought", "dim")
    groups = {TEXT: found.group(TEXT)[["tokens"]]}
    places = {name: found.z.coords[name] for name in axes}
    draws = {"chain": range(CHAINS), "draw": range(samples // CHAINS)}
    groups["posterior"] = xr.Dataset({"z": ((*SAMPLES, *axes), shaped)}, places | draws)
    mean = found.stats[["mean"]].transpose(*axes)
    groups[SEQUENCES] = xr.Dataset({name: (axes, x) for name, x in diagnostics.items()}).assign(mean)
    groups["constant_data"] = found.group("constant_data")
    return Posterior(xr.DataTree.from_dict(groups))


@pytest.fixture
def inputs(exact, posterior, simulate):
    """Makes the inputs of a report on texts of a known model under a q with some fault."""

    def make(shift=0.0, scale=1.0, replicas_of=None):
        model = LinearGaussianModel(ThoughtShape(2, 1, 2), length=6)
        q, right, batch = exact(model, scale, shift=shift), exact(model), model.sample_batch(TEXTS)
        found = posterior(model, q, batch, 200)
        z_RBLKD = torch.from_numpy(found.z.values[0, :2])
        found = with_replicas(found, replicas_of or model, batch, z_RBLKD)
        few = batch.select(torch.arange(COMPARED))
        chains = as_chains(posterior(model, right, few, 2000), 2000)
        chains.tree[TEXT] = found.select(slice(COMPARED)).group(TEXT)
        ranks = calibrate(model, q, LocalInference(steps=0), simulate(model), simulations=60, samples=49)
        return ReportInputs(found, calibration=ranks, reference=chains)

    return make


def flagged(inputs, names=JUDGED):
    return [name for name in names if getattr(sections, name)(inputs).good is False]


@pytest.mark.parametrize("repeats", REPEATS)
def test_an_exact_q_is_seldom_flagged(inputs, repeats):
    found = [flagged(inputs()) for _ in range(repeats)]
    assert sum(map(bool, found)) <= max(repeats / 10, 2), found  # of few repeats three would be too many at one in ten


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize(
    ("fault", "sections_that_see_it"),
    [
        ({"shift": 3.0}, {"trust", "calibration", "reference"}),
        ({"scale": 3.0}, {"calibration", "reference"}),
        ({"scale": 0.5}, {"trust", "calibration", "reference"}),
    ],
    ids=["shifted by 3 sd", "three times too wide", "half too narrow"],
)
def test_a_wrong_q_is_flagged(inputs, fault, sections_that_see_it, repeats):
    found = [flagged(inputs(**fault)) for _ in range(repeats)]
    for name in sections_that_see_it:
        assert sum(name in names for names in found) >= 0.9 * repeats, (name, found)


@pytest.mark.parametrize("repeats", REPEATS)
def test_replicas_of_another_model_are_flagged(inputs, repeats):
    other = LinearGaussianModel(ThoughtShape(2, 1, 2), length=6, noise=2.0)
    assert sum(flagged(inputs(replicas_of=other), ["predictive"]) != [] for _ in range(repeats)) >= 0.9 * repeats


def test_a_k_hat_that_is_no_number_is_not_trusted(inputs):
    made = inputs()
    made.posterior.tree[SEQUENCES]["pareto_k"][3] = np.nan
    assert flagged(made, ["trust"]) == ["trust"]
    assert "1 of 60 sequences" in sections.trust(made).verdict


@pytest.mark.parametrize("repeats", REPEATS)
def test_saturated_information_is_said(exact, posterior, repeats):
    found = []
    for _ in range(repeats):
        loud = LinearGaussianModel(ThoughtShape(2, 1, 6), length=24, noise=0.02)
        guide = exact(loud)
        parts = decompose(loud, guide, posterior(loud, guide, loud.sample_batch(20), 50))
        found.append(parts.saturated)
        true = torch.logdet(torch.eye(24) + loud.matrix_TN @ loud.matrix_TN.T / 0.02**2).item() / 2
        assert parts.mutual_information <= parts.most + 1e-9 < true
    assert sum(found) >= 0.9 * repeats
    quiet = LinearGaussianModel(ThoughtShape(2, 1, 2), length=2, noise=1.0)
    guide = exact(quiet)
    assert not decompose(quiet, guide, posterior(quiet, guide, quiet.sample_batch(100), 50)).saturated


def test_two_texts_that_cannot_be_told_apart_do_not_saturate(exact, posterior):
    dull = LinearGaussianModel(ThoughtShape(2, 1, 2), length=6, noise=50.0)
    guide = exact(dull)
    for size in (2, 3, 4):
        parts = decompose(dull, guide, posterior(dull, guide, dull.sample_batch(size), 50))
        assert abs(parts.mutual_information) < 0.05
        assert not parts.saturated


def test_replicas_that_equal_their_texts_do_not_differ(inputs):
    """Of five tokens two are different, in every text and replica: the mean of three such shares is rounded."""
    made = inputs()
    tree = made.posterior.tree
    row = np.array([1, 1, 1, 1, 2])
    axes = ("replica", "sequence", "replica_token")
    texts = {"tokens": (("sequence", "token"), np.tile(row, (TEXTS, 1)))}
    tree[TEXT] = xr.Dataset(texts | {"replica_tokens": (axes, np.tile(row, (3, TEXTS, 1)))})
    assert sections.predictive(made).good is True


def test_pieces_of_a_document_are_no_independent_draws(exact, posterior):
    """The aggregated posterior is compared with the prior by the first sequence of each document."""
    model = LinearGaussianModel(ThoughtShape(2, 1, 2), length=6)
    batch = model.sample_batch(TEXTS)
    found = posterior(model, exact(model), batch, 25)
    document = np.array([str(n // 2) for n in range(TEXTS)])
    found.tree["constant_data"] = xr.Dataset({"document": ("sequence", document)})
    assert aggregate(found) == aggregate(found.select(range(0, TEXTS, 2)))
    found.tree["constant_data"] = xr.Dataset({"document": ("sequence", np.repeat(["a", "b"], TEXTS // 2))})
    with pytest.raises(UsageError, match="20 documents, got 2"):
        aggregate(found)


@pytest.mark.parametrize(("chains", "draws"), [(2, 100), (2, 500), (4, 250)])
def test_the_largest_r_hat_of_exact_chains_is_seldom_called_late(chains, draws):
    """Independent draws of 64 coordinates of 3 sequences; chains that are two standard deviations apart are seen."""
    torch.manual_seed(0)
    late, coordinates = [], (3, 4, 4, 4)
    for _ in range(20):
        z = torch.randn(chains, draws, *coordinates)
        axes = (*SAMPLES, "sequence", "layer", "thought", "dim")
        names = xr.Dataset({"document": ("sequence", np.array(["x"] * 3, dtype=object))})
        stats = xr.Dataset({"mean": (axes[2:], z.mean((0, 1)).numpy())})
        groups = {"posterior": xr.Dataset({"z": (axes, z.numpy())}), SEQUENCES: stats, "constant_data": names}
        limit = largest_r_hat(Posterior(xr.DataTree.from_dict(groups)))
        late.append(convergence(z)["r_hat"].max() > limit)
        z[0] += 2.0
        assert convergence(z)["r_hat"].min() > limit
    assert np.mean(late) <= 0.15


def test_what_is_no_number_is_left_out_and_said(inputs):
    made = inputs()
    stats = made.posterior.tree[SEQUENCES].to_dataset()
    before = _headline_figures(made.posterior)
    worst = np.argsort(stats["elbo"].values)[: TEXTS // 2]
    elbo = stats["elbo"].values.copy()
    elbo[worst] = np.nan
    made.posterior.tree[SEQUENCES] = stats.assign(elbo=("sequence", elbo))
    tokens_N = (made.posterior.group(TEXT)["tokens"] >= 0).sum("token").values
    found = _headline_figures(made.posterior)
    kept = np.isfinite(elbo)
    assert float(found["ELBO, nats per token"]) == pytest.approx(elbo[kept].sum() / tokens_N[kept].sum(), abs=5e-4)
    assert found["sequences without a finite figure, left out"] == f"{TEXTS // 2} of {TEXTS}"
    assert "sequences without a finite figure, left out" not in before


def test_a_statistic_that_is_no_number_hides_no_other(inputs):
    def strange(text):
        return float("nan") if text == first else 0.0

    made = inputs(replicas_of=LinearGaussianModel(ThoughtShape(2, 1, 2), length=6, noise=30.0))
    texts = np.array([f"text {n}" for n in range(TEXTS)], dtype=object)
    replicas = np.array([[f"replica {n}" for n in range(TEXTS)]] * 2, dtype=object)
    known = made.posterior.group(TEXT)
    made.posterior.tree[TEXT] = known.assign(text=("sequence", texts), replica_text=(("replica", "sequence"), replicas))
    first = "text 0"
    alone = predictive(made)
    found = predictive(made._replace(statistics={"strange": strange}))
    assert not alone.good
    assert not found.good
    assert "Not a number for some text, and so not compared: strange." in found.verdict
    assert found.verdict.startswith(alone.verdict.rstrip("."))
