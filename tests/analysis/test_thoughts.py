"""Probes, neighbours, ablation, context, predictive checks and LOO against known answers."""

import numpy as np
import pytest
import torch

from ltm_pyro.analysis.context import shift
from ltm_pyro.analysis.draw_posterior import DrawOptions, draw_batch_posterior
from ltm_pyro.analysis.interventions import ablate
from ltm_pyro.analysis.loo import loo_by_factor
from ltm_pyro.analysis.model_comparison import evidence_records
from ltm_pyro.analysis.pictures.thoughts import plot_map
from ltm_pyro.analysis.posterior import TEXT
from ltm_pyro.analysis.predictive import check
from ltm_pyro.analysis.probes import neighbours, numeric_labels, probable_labels, probe, probe_thoughts, regress
from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import LinearGaussianModel

STILL = LocalInference(steps=0)


def labelled(found, values):
    found.tree["constant_data"] = found.tree["constant_data"].to_dataset().assign(kind=("sequence", np.array(values)))
    return found


def test_a_probe_reads_what_is_there_and_nothing_else(known, exact, posterior):
    precise = LinearGaussianModel(known.prior.shape, noise=0.1)
    found = posterior(precise, exact(precise), precise.sample_batch(150), 100)
    first = found.stats["mean"].values[:, 0, 0, 0] > 0
    said = probe(labelled(found, np.where(first, "up", "down")), "kind")
    assert said.thoughts.mean > 0.9
    assert said.majority == max(first.mean(), 1 - first.mean())
    coin = np.random.default_rng(0).random(150) > 0.5
    said = probe(labelled(found, np.where(coin, "heads", "tails")), "kind")
    assert abs(said.thoughts.mean - 0.5) < 3.5 * said.thoughts.stderr
    assert probable_labels(found) == ["kind"]


def test_numbers_stay_numbers_and_missing_ones_are_counted(known, exact, posterior):
    precise = LinearGaussianModel(known.prior.shape, noise=0.1)
    found = posterior(precise, exact(precise), precise.sample_batch(150), 100)
    size = found.stats["mean"].values[:, 0, 0, 0].astype(float)
    noise = np.random.default_rng(0).normal(size=150)
    size[:30] = np.nan
    constant = found.tree["constant_data"].to_dataset()
    found.tree["constant_data"] = constant.assign(size=("sequence", size), noise=("sequence", noise))
    assert found.labels["size"][:31] == [None] * 30 + [pytest.approx(size[30])]
    assert numeric_labels(found) == ["size", "noise"]
    assert probable_labels(found) == []
    said = regress(found, "size")
    assert (said.missing, said.sequences) == (30, 120)
    assert said.thoughts.mean > 0.95
    assert abs(said.tokens.mean) < 0.5
    assert regress(found, "noise").thoughts.mean < 3.5 * regress(found, "noise").thoughts.stderr
    with pytest.raises(UsageError, match="is no number with 10 documents"):
        regress(found, "document")


def test_classes_of_one_member_and_missing_values_break_no_probe(known, exact, posterior):
    found = posterior(known, exact(known), known.sample_batch(30), 50)
    said = probe(labelled(found, ["a"] * 10 + ["b"] * 10 + ["only"] + [""] * 9), "kind")
    assert (said.classes, said.too_rare, said.missing, said.sequences) == (("a", "b"), ("only",), 9, 20)


@pytest.mark.parametrize("repeats", [pytest.param(3, id="few"), pytest.param(100, id="many", marks=pytest.mark.slow)])
def test_probes_of_many_thoughts_are_corrected_for_their_number(exact, posterior, repeats):
    """One thought carries the label, eleven do not; with a random label hardly ever any is named."""
    model = LinearGaussianModel(ThoughtShape(3, 4, 1), length=24, noise=0.2)
    named = 0
    for seed in range(repeats):
        found = posterior(model, exact(model), model.sample_batch(80), 25)
        up = found.stats["mean"].values[:, 1, 2, 0] > 0
        said = probe_thoughts(labelled(found, np.where(up, "up", "down")), "kind")
        assert said.p_value.sel(layer=2, thought=3) < 0.01
        coin = np.random.default_rng(seed).random(80) > 0.5
        named += bool((probe_thoughts(labelled(found, np.where(coin, "h", "t")), "kind").p_value < 0.05).any())
    assert named <= max(1, 0.1 * repeats)


def test_parts_of_one_document_never_help_each_other(known, exact, posterior):
    """Every document is there twice: a probe trained on the other copy would always predict a random label."""
    batch = known.sample_batch(60).select(torch.arange(60).repeat(2))
    found = posterior(known, exact(known), batch, 50)
    constant = found.tree["constant_data"].to_dataset()
    coin = np.tile(np.where(np.random.default_rng(0).random(60) > 0.5, "heads", "tails"), 2)
    names = np.array([f"document:{index}" for index in [*range(60)] * 2])
    found.tree["constant_data"] = constant.assign(kind=("sequence", coin), document=("sequence", names))
    assert probe(found, "kind").thoughts.mean < 0.7


def test_what_cannot_be_probed(known, exact, posterior):
    found = posterior(known, exact(known), known.sample_batch(8), 50)
    with pytest.raises(UsageError, match="no label 'kind': the labels are document"):
        probe(found, "kind")
    with pytest.raises(UsageError, match="fewer than two classes of 5"):
        probe(labelled(found, ["a"] * 6 + ["b"] * 2), "kind")
    with pytest.raises(UsageError, match="no sequence 8"):
        neighbours(found, 8)


def test_the_nearest_neighbour_is_the_same_text(known, exact, posterior):
    batch = known.sample_batch(6).select(torch.tensor([0, 1, 2, 3, 4, 5, 2]))
    found = posterior(known, exact(known), batch, 1000)
    assert neighbours(found, 2, 1)[0].sequence == 6
    assert neighbours(found, 2, 1)[0].distance == pytest.approx(0, abs=0.2)  # the means are those of 1,000 draws
    distances = [x.distance for x in neighbours(found, 0, 9)]
    assert distances == sorted(distances)
    assert len(distances) == 6


def test_ablation_costs_what_the_quadratic_form_says(exact, posterior):
    """Ablating a layer that no observation depends on costs nothing, the other E|A(z − z̃)|² / 2s² on average."""
    model = LinearGaussianModel(ThoughtShape(2, 1, 3), length=6, noise=1.0)
    model.matrix_TN[:, 3:] = 0
    batch = model.sample_batch(300)
    lost = ablate(model, posterior(model, exact(model), batch, 64), draws=8)
    truth = model.posterior(batch)
    residual = model.observed(batch) - truth.mean_BN @ model.matrix_TN.T
    spread = torch.trace(model.matrix_TN @ truth.covariance_BNN[0] @ model.matrix_TN.T)
    fitted = (residual**2).sum(-1).mean() + spread
    blind = (model.observed(batch) ** 2).sum(-1).mean() + torch.trace(model.matrix_TN @ model.matrix_TN.T)
    assert lost.by_layer.values[1] == pytest.approx(0, abs=1e-9)
    assert abs(lost.by_layer[0] - ((blind - fitted) / 2).item()) < 4 * lost.by_layer_stderr[0]
    np.testing.assert_allclose(lost.by_thought[:, 0], lost.by_layer)


def test_one_sequence_has_no_standard_error(known, exact, posterior):
    lost = ablate(known, posterior(known, exact(known), known.sample_batch(1), 25))
    assert lost.by_layer.notnull().all()
    assert lost.by_layer_stderr.isnull().all()


def test_one_coordinate_has_a_map(exact, posterior):
    one = LinearGaussianModel(ThoughtShape(1, 1, 1))
    found = labelled(posterior(one, exact(one), one.sample_batch(6), 25), list("aabbab"))
    points = np.concatenate([x.get_offsets() for x in plot_map(found, "kind").collections])
    spread = found.stats["mean"].values.ravel()
    np.testing.assert_allclose(np.ptp(points, axis=0), [np.ptp(spread), 0])


def test_belief_moves_as_the_exact_posterior_does(known, exact):
    batch = known.sample_batch(4)
    lengths = [1, 3, 6]
    found = shift(known, exact(known), batch, STILL, lengths)
    for index, length in enumerate(lengths):
        truth = known.posterior(batch.crop(0, length))
        prior = torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6))
        q = torch.distributions.MultivariateNormal(truth.mean_BN, truth.covariance_BNN)
        kl_B = torch.distributions.kl_divergence(q, prior).numpy()
        np.testing.assert_allclose(found.kl_to_prior[index], kl_B, atol=4 * 6**0.5 / 64**0.5)
    assert (np.diff(found.kl_to_prior.mean("sequence")) > 0).all()
    assert (found.distance[-1] == 0).all()
    assert found.nats[-1].isnull().all()
    with pytest.raises(UsageError, match="from 1 to 6"):
        shift(known, exact(known), batch, STILL, [1, 7])


def test_predictive_checks_pass_replicas_of_the_same_kind_and_flag_others(known, exact, posterior):
    found = posterior(known, exact(known), known.sample_batch(200), 50)
    random = np.random.default_rng(0)
    own = found.tree[TEXT].to_dataset()
    found.tree[TEXT] = own.assign(tokens=(("sequence", "token"), random.integers(0, 50, (200, 6))))
    axes = ("replica", "sequence", "replica_token")
    same, few = random.integers(0, 50, (3, 200, 6)), random.integers(0, 3, (3, 200, 6))
    for tokens, low, high in ((same, 0.05, 1), (few, 0.0, 1e-6)):
        found.tree[TEXT] = found.group(TEXT).assign(replica_tokens=(axes, tokens))
        assert low <= check(found).p_value.sel(statistic="different_tokens") <= high
    assert check(found).p_value.sel(statistic="tokens") == 1
    assert check(found).difference.sel(statistic="different_tokens") > 0.3
    with pytest.raises(UsageError, match="--replicas"):
        check(posterior(known, exact(known), known.sample_batch(2), 50))


@pytest.mark.parametrize("guide", ["exact", "mean-field"])
def test_leaving_out_meets_the_closed_forms(exact, guide):
    """By sequence the log evidence, by token log p(y_t | the others), also through a factorised q."""
    known = LinearGaussianModel(ThoughtShape(2, 1, 3), noise=1.5)
    batch = known.sample_batch(3)
    q, inference = (
        (exact(known), STILL) if guide == "exact" else (MeanField(known), LocalInference(steps=200, rate=0.1))
    )
    found = draw_batch_posterior(known, q, batch, inference, DrawOptions(samples=4000))
    evidence_B = known.log_evidence(batch)
    evidence = [x["evidence_nats"] for x in evidence_records(found)]
    np.testing.assert_allclose(evidence, evidence_B, atol=1e-6 if guide == "exact" else 0.15)
    left = loo_by_factor(found)
    for token in range(6):
        kept_BT = batch.mask_BT & (torch.arange(6) != token)
        expected_B = evidence_B - known.log_evidence(batch._replace(mask_BT=kept_BT))
        trusted = (left.pareto_k[:, token] < 0.6).values
        np.testing.assert_allclose(left.elpd[trusted, token], expected_B[torch.from_numpy(trusted)], atol=0.2)
    assert (left.pareto_k < 0.7).mean() > 0.6
