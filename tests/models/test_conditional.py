"""Priors that depend on labels of the documents: what they are, what unknown labels mean, and what pooling is worth."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule

from ltm_pyro.contracts import ThoughtShape, make_batch, sequence_plate
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.covariates import Covariates, documents_of, prior_arguments, with_labels
from ltm_pyro.inference.latent_sites import prior_sites
from ltm_pyro.inference.local import infer_local, init
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.inference.svi import DualRateSVI
from ltm_pyro.models import ConditionalPrior, GroupedPrior, LatentThoughtModel, LinearGaussianModel
from ltm_pyro.training.check_model import check_model

SHAPE = ThoughtShape(1, 1, 2)
LEVELS = ["news", "reviews", 3]


class Linear(LinearGaussianModel):
    """Thoughts seen through a matrix, under a prior that asks for labels."""

    def __init__(self, prior, noise=0.5):
        super().__init__(SHAPE, length=4, noise=noise)
        self.prior, self.covariates = prior, Covariates(prior)

    covariates_of = LatentThoughtModel.covariates_of

    def prepare(self, batch):
        return super().prepare(batch)._replace(covariates_BC=self.covariates_of(batch))

    def sample_prior(self, size, covariates_BC=None):
        with sequence_plate(size):
            return self.prior(**self.covariates.arguments(covariates_BC, size, torch.device("cpu")))

    def forward(self, batch):
        z_BLKD = self.sample_prior(*prior_arguments(self, batch))
        with sequence_plate(batch.size):
            pyro.sample("tokens", self.observation(z_BLKD, batch), obs=self.observed(batch))
        return z_BLKD


def labelled(model, values, z_BLKD=None):
    """Sequences with the label ``source``; no label where the value is None."""
    batch = model.sample_batch(len(values)) if z_BLKD is None else model.sample_tokens(z_BLKD)
    return with_labels(batch, [{} if value is None else {"source": value} for value in values])


def density_B(model, batch):
    with torch.no_grad():
        node = poutine.trace(model.sample_prior).get_trace(*prior_arguments(model, batch)).nodes["z"]
    return node["fn"].base_dist


def perturbed(prior):
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return prior


def test_a_known_label_has_its_own_normal_and_an_unknown_one_that_of_all_levels():
    prior = perturbed(ConditionalPrior(SHAPE, "source", LEVELS))
    model = Linear(prior)
    found = density_B(model, labelled(model, ["reviews", 3, "news", None, "letters", "3"]))
    order, scale_GLKD = [1, 2, 0], prior.log_scale_GLKD.exp()
    torch.testing.assert_close(found.loc[:3], prior.mean_GLKD[order])
    torch.testing.assert_close(found.scale[:3], scale_GLKD[order])
    draws = torch.randn(100_000, 3, *SHAPE) * scale_GLKD + prior.mean_GLKD
    mixture = draws.flatten(0, 1)
    for row in (3, 4, 5):  # missing, not among the levels, and a text where the level is a number
        torch.testing.assert_close(found.loc[row], mixture.mean(0), atol=0.02, rtol=0)
        torch.testing.assert_close(found.scale[row], mixture.std(0), rtol=0.01, atol=0)


def test_an_unknown_group_is_a_new_one():
    prior = perturbed(GroupedPrior(SHAPE, "source", LEVELS))
    model = Linear(prior)
    with torch.no_grad():
        prior.effect.log_scale.fill_(-30.0)  # q of the effects is a point
    found = density_B(model, labelled(model, ["news", None, "letters"]))
    torch.testing.assert_close(found.loc[0], prior.group_means()[0][0])
    torch.testing.assert_close(found.scale[0], prior.log_scale_LKD.exp())
    spread = (2 * prior.log_scale_LKD).exp() + (2 * prior.log_tau_LKD).exp()
    for row in (1, 2):
        torch.testing.assert_close(found.loc[row], prior.mean_LKD)
        torch.testing.assert_close(found.scale[row] ** 2, spread)


def test_labels_arrive_by_name_as_numbers_of_levels_or_as_numbers():
    class Own(PyroModule):
        levels = {"source": ["a", "b"]}

        def forward(self, source, year, spread=1.0):
            self.seen = (source, year)
            mean_B = source + year.nan_to_num(0.0)
            return pyro.sample("z", dist.Normal(mean_B[..., None, None, None].expand(-1, *SHAPE), spread).to_event(3))

    model = Linear(Own())
    assert model.covariates.names == ("source", "year")
    labels = [{"source": "b", "year": 1990}, {"year": 2.5}, {"source": "c", "year": None}]
    batch = with_labels(model.sample_batch(3), labels)
    prior_sites(model, *prior_arguments(model, batch))
    source_B, year_B = model.prior.seen
    assert source_B.tolist() == [2, 0, 0]
    torch.testing.assert_close(year_B, torch.tensor([1990.0, 2.5, math.nan]), equal_nan=True)
    with pytest.raises(UsageError, match=r"label 'year'.* the value 'soon' and no `levels`"):
        model.prepare(with_labels(model.sample_batch(1), [{"year": "soon"}]))


def test_a_row_of_several_documents_has_the_label_that_they_share(tiny_batch):
    batch = with_labels(tiny_batch(2), [{"source": "news"}, {"source": "news"}])
    (one,), (two,) = batch.parts
    other = with_labels(tiny_batch(1), [{"source": "reviews"}]).parts[0][0]
    found = documents_of(batch._replace(parts=((one, two), (two, other))))
    assert [x and x.labels for x in found] == [{"source": "news"}, None]
    assert documents_of(tiny_batch(2)) == [None, None]


def test_q_starts_and_ends_where_the_label_says_whatever_the_batch():
    prior = ConditionalPrior(SHAPE, "source", LEVELS)
    with torch.no_grad():
        prior.mean_GLKD += torch.tensor([-3.0, 0.0, 3.0])[:, None, None, None]
    model = Linear(prior)
    batch, guide = labelled(model, ["news", 3, "reviews", 3]), MeanField(model)
    start = init(model, guide, batch, LocalInference()).parameters["z_loc"]
    torch.testing.assert_close(start, prior.mean_GLKD.detach()[[0, 2, 1, 2]])
    exact = LocalInference(steps=250, rate=0.2, particles=4, noise="antithetic")
    whole, _ = infer_local(model, guide, batch, exact)
    # the posterior of a linear-Gaussian model with this prior's mean: that of the paper's prior, shifted
    for row, mean in enumerate([-3.0, 3.0, 0.0, 3.0]):
        y_T, matrix_TN = model.observed(batch)[row], model.matrix_TN
        precision_NN = torch.eye(2) + matrix_TN.T @ matrix_TN / model.noise**2
        rest_T = y_T - matrix_TN.sum(1) * mean
        expected_N = mean + torch.linalg.solve(precision_NN, matrix_TN.T @ rest_T / model.noise**2)
        torch.testing.assert_close(whole.parameters["z_loc"][row].flatten(), expected_N, atol=0.01, rtol=0)


@pytest.mark.parametrize("levels", [[], ["a", "a"]])
@pytest.mark.parametrize("prior", [ConditionalPrior, GroupedPrior])
def test_levels_are_given_once(prior, levels):
    with pytest.raises(UsageError, match="needs the different values of the label 'source' as `levels`"):
        prior(SHAPE, "source", levels)


@pytest.mark.parametrize("prior", [ConditionalPrior, GroupedPrior])
def test_it_can_be_trained_on_text(prior, tiny_decoder):
    decoder = tiny_decoder()
    model = LatentThoughtModel(prior(decoder.thought_shape, "source", LEVELS), decoder)
    guide = MeanField(model)
    check_model(model, guide)
    batch = make_batch(torch.randint(1, 11, (4, 6)), torch.tensor([6, 5, 6, 4]), start_token=0)
    batch = with_labels(batch, [{"source": "news"}, {"source": "reviews"}, {}, {"source": 3}])
    svi = DualRateSVI(model, guide, lambda name: {"lr": 0.1}, LocalInference(steps=2), corpus=4)
    before = {name: x.detach().clone() for name, x in model.prior.named_parameters()}
    for _ in range(2):
        svi.step(batch)
    for name, x in model.prior.named_parameters():
        assert (x != before[name]).all(), name


def fitted(prior, batch, steps=250):
    """The prior learned from a batch, q kept between the steps."""
    model = Linear(prior)
    svi = DualRateSVI(
        model,
        MeanField(model),
        lambda name: {"lr": 0.1 if name.startswith("local.") else 0.03},
        LocalInference(steps=1, schedule="constant", particles=2, noise="antithetic"),
        corpus=batch.size,
    )
    state = None
    for _ in range(steps):
        svi.step(batch, state)
        state = svi.state
    return model, state


def test_partial_pooling_is_ahead_of_no_pooling_and_of_complete_pooling():
    """Groups of 2 to 200 documents whose means are drawn around a common one; errors of the estimated means."""
    torch.manual_seed(1)
    sizes = [2, 2, 2, 3, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200]
    truth_GLKD = 1.0 + 0.7 * torch.randn(len(sizes), *SHAPE)
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    z_BLKD = truth_GLKD[groups] + torch.randn(len(groups), *SHAPE)
    levels = [*range(len(sizes))]
    batch = labelled(Linear(ConditionalPrior(SHAPE, "source", levels)), groups, z_BLKD)
    partial, _ = fitted(GroupedPrior(SHAPE, "source", levels), batch)
    apart, _ = fitted(ConditionalPrior(SHAPE, "source", levels), batch)
    complete, _ = fitted(ConditionalPrior(SHAPE, "source", ["all"]), labelled_as_one(batch))

    def error(mean_GLKD):
        return (mean_GLKD.detach() - truth_GLKD).square().mean().sqrt().item()

    pooled = error(partial.prior.group_means()[0])
    assert pooled < error(apart.prior.mean_GLKD)
    assert pooled < error(complete.prior.mean_GLKD)
    shrinkage_G = partial.prior.shrinkage()
    assert shrinkage_G[:3].mean() > 3 * shrinkage_G[-3:].mean()
    inside = (partial.prior.group_means()[0] - truth_GLKD).abs() < 3 * partial.prior.group_means()[1]
    assert inside.float().mean() > 0.9


def labelled_as_one(batch):
    return with_labels(batch, [{"source": "all"}] * batch.size)
