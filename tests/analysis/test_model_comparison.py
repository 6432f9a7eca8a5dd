"""Models are ranked by the evidence of documents: closed forms, and how often the ranking and a winner are wrong."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.optimize import minimize
from scipy.special import logsumexp

from ltm_pyro.analysis.draw_posterior import DrawOptions, draw_batch_posterior
from ltm_pyro.analysis.model_comparison import evidence_records, rank, stacking_weights
from ltm_pyro.analysis.posterior import SEQUENCES, TEXT, Posterior
from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.ais import Annealing
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import LinearGaussianModel

STILL = LocalInference(steps=0)
REPEATS = [pytest.param(5, id="few"), pytest.param(100, id="many", marks=pytest.mark.slow)]
DOCUMENTS = 349  # at which the true prior is 4 standard errors ahead of the wider one


def with_prior(scales, noise=0.5):
    """z ~ N(0, diag(scales²)) observed with noise, written as a standard normal prior and a scaled matrix."""
    model = LinearGaussianModel(ThoughtShape(1, 1, 2), length=2, noise=noise)
    model.matrix_TN = torch.diag(torch.tensor(scales))
    return model


TRUE, WIDE, WIDE_TOO = (1.0, 1.0), (1.4, 1.0), (1.0, 1.4)


@pytest.fixture
def ranked(exact, posterior):
    """The ranking of models on documents of the true one, whose evidence is exact."""

    def make(models, documents):
        batch = with_prior(TRUE).sample_batch(documents)
        return rank({str(x): posterior(with_prior(x), exact(with_prior(x)), batch, 25) for x in models}), batch

    return make


def test_evidence_differences_and_errors_are_the_closed_forms(ranked):
    found, batch = ranked([WIDE, TRUE], 50)
    truth = {str(x): with_prior(x).log_evidence(batch) for x in (TRUE, WIDE)}
    first, second = found.candidates
    assert first.evidence == pytest.approx(truth[first.name].mean().item(), abs=1e-6)
    apart = truth[first.name] - truth[second.name]
    assert second.behind == pytest.approx(apart.mean().item(), abs=1e-6)
    assert second.behind_stderr == pytest.approx(apart.std().item() / 50**0.5, abs=1e-6)
    assert first.nats_per_token == pytest.approx(-truth[first.name].mean().item() / 2, abs=1e-6)
    assert first.weight + second.weight == pytest.approx(1)
    assert first.untrusted == 0


def test_the_difference_is_four_standard_errors():
    """0.066 nats per document, whose standard deviation is 0.31: 4 standard errors at 349 documents."""
    batch = with_prior(TRUE).sample_batch(20_000)
    apart = with_prior(TRUE).log_evidence(batch) - with_prior(WIDE).log_evidence(batch)
    assert apart.mean().item() == pytest.approx(0.066, abs=0.005)
    assert (apart.mean() / apart.std() * DOCUMENTS**0.5).item() == pytest.approx(4, abs=0.3)


def of_evidence(scales, batch):
    """A posterior that has nothing but the exact evidence of each document under a prior."""
    evidence_B = with_prior(scales).log_evidence(batch).numpy()
    stats = {"iwae": evidence_B, "kl": np.zeros(len(evidence_B)), "pareto_k": np.zeros(len(evidence_B))}
    mean = (("sequence", "layer", "thought", "dim"), np.zeros((len(evidence_B), 1, 1, 2)))
    names = np.array([f"d{n}" for n in range(len(evidence_B))], dtype=object)
    groups = {
        SEQUENCES: xr.Dataset({name: ("sequence", x) for name, x in stats.items()} | {"mean": mean}),
        TEXT: xr.Dataset({"tokens": (("sequence", "token"), batch.targets_BT.numpy())}),
        "constant_data": xr.Dataset({"document": ("sequence", names)}),
    }
    return Posterior(xr.DataTree.from_dict(groups))


def rankings(models, documents, repeats):
    """Rankings, each of new documents of the true model."""
    for _ in range(repeats):
        batch = with_prior(TRUE).sample_batch(documents)
        yield rank({str(x): of_evidence(x, batch) for x in models})


@pytest.mark.parametrize("repeats", REPEATS)
def test_the_true_prior_is_first_when_it_is_four_standard_errors_ahead(repeats):
    first = [x.candidates[0].name for x in rankings([WIDE, TRUE], DOCUMENTS, repeats)]
    assert first.count(str(TRUE)) >= 0.95 * repeats


@pytest.mark.parametrize("repeats", REPEATS)
def test_equal_priors_seldom_have_a_winner(repeats):
    """Two priors that are wrong in the same way, so that neither is better on average."""
    assert sum(x.winner is not None for x in rankings([WIDE, WIDE_TOO], DOCUMENTS, repeats)) <= 0.05 * max(repeats, 20)


def test_stacking_weights_maximise_the_mixture(exact):
    random = np.random.default_rng(0)
    evidence = random.normal(size=(60, 3)) * 2 - 900  # whose exponentials underflow
    found = stacking_weights(evidence)

    def loss(logits):
        weights = np.exp(logits - logsumexp(logits))
        return -logsumexp(evidence + np.log(weights), axis=1).sum()

    best = minimize(loss, np.zeros(3))
    assert -logsumexp(evidence + np.log(found), axis=1).sum() == pytest.approx(best.fun, abs=1e-3)
    np.testing.assert_allclose(stacking_weights(np.array([[0.0, -800.0]] * 5)), [1, 0], atol=1e-12)


def test_annealing_finds_what_a_factorised_q_misses():
    model = LinearGaussianModel(ThoughtShape(1, 1, 3), length=3, noise=0.2)
    batch = model.sample_batch(20)
    options = DrawOptions(samples=25, annealing=Annealing(temperatures=16))
    found = draw_batch_posterior(model, MeanField(model), batch, LocalInference(steps=60, rate=0.1), options)
    truth = model.log_evidence(batch).numpy()
    assert (abs(found.stats["ais"].values - truth)).mean() < 0.7 * (abs(found.stats["iwae"].values - truth)).mean()
    both = rank({"a": found, "b": found})
    assert both.estimator == "ais"
    assert both.candidates[0].ais_gain == pytest.approx(float((found.stats["ais"] - found.stats["iwae"]).mean()))
    assert both.winner is None


def test_pieces_of_a_document_are_added(known, exact, posterior):
    found = posterior(known, exact(known), known.sample_batch(4), 25)
    found.tree["constant_data"] = xr.Dataset({"document": ("sequence", np.array(list("abab"), dtype=object))})
    records = evidence_records(found)
    assert [x["id"] for x in records] == ["a", "b"]
    assert records[0]["evidence_nats"] == pytest.approx(float(found.stats["iwae"][[0, 2]].sum()))
    assert records[0]["tokens"] == 12


def test_what_cannot_be_compared(known, exact, posterior):
    found = posterior(known, exact(known), known.sample_batch(4), 25)
    with pytest.raises(UsageError, match="at least two posteriors, got 1"):
        rank({"a": found})
    with pytest.raises(UsageError, match="same documents"):
        rank({"a": found, "b": found.select([0, 1])})
    with pytest.raises(UsageError, match="no ais"):
        rank({"a": found, "b": found}, "ais")
