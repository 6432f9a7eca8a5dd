"""Errors of an evaluation's figures: by document, paired, and as often right as they say."""

import pytest
import torch

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.inference.scores import rate_of
from ltm_pyro.models import LinearGaussianModel

DATA_SETS = 2000


def elbo(model, batch):
    """The ELBO of the best factorised Gaussian in closed form, which `MeanField` converges to."""
    q, y_BT = model.factorised(batch), model.observed(batch)
    matrix_TN, variance_BN = model.matrix_TN, q.covariance_BNN.diagonal(dim1=-2, dim2=-1)
    spread_BT = variance_BN @ (matrix_TN**2).T
    noise = torch.tensor(model.noise)
    nats_BT = ((y_BT - q.mean_BN @ matrix_TN.T) ** 2 + spread_BT) / (2 * noise**2) + noise.log()
    kl_BN = (variance_BN + q.mean_BN**2 - 1 - variance_BN.log()) / 2
    return -nats_BT.sum(-1) - kl_BN.sum(-1)


@pytest.mark.parametrize("documents", [5, 8, 20])
def test_paired_intervals_over_documents_cover_as_often_as_they_say(documents):
    """Pieces of a document share their thoughts; two models are compared by the bounds of mean-field q."""
    right = LinearGaussianModel(ThoughtShape(2, 1, 2))
    other = LinearGaussianModel(ThoughtShape(2, 1, 2), noise=0.8)
    pieces_G = torch.randint(1, 5, (DATA_SETS * documents,))
    with torch.no_grad():
        z_BLKD = right.sample_prior(len(pieces_G)).repeat_interleave(pieces_G, 0)
        batch = right.sample_tokens(z_BLKD)
        difference_B = elbo(right, batch) - elbo(other, batch)
    document_B = torch.arange(len(pieces_G)).repeat_interleave(pieces_G)
    data_set_B = document_B // documents
    truth = difference_B.mean().item() / right.length
    covered = alone = 0
    for number in range(DATA_SETS):
        mine_B = data_set_B == number
        tokens_B = torch.full((int(mine_B.sum()),), float(right.length))
        low, high = rate_of(difference_B[mine_B], tokens_B, document_B[mine_B]).interval
        covered += low <= truth <= high
        low, high = rate_of(difference_B[mine_B], tokens_B).interval
        alone += low <= truth <= high
    assert 0.935 <= covered / DATA_SETS <= 0.965
    assert alone < covered, "pieces that are taken for independent make intervals too short"


def test_the_closed_form_is_the_bound():
    """Against draws, so that the coverage above is that of the library's own figure."""
    model = LinearGaussianModel(ThoughtShape(2, 1, 2))
    with torch.no_grad():
        batch = model.sample_batch(5)
    q = model.factorised(batch)
    variance_BN = q.covariance_BNN.diagonal(dim1=-2, dim2=-1)
    z_SBN = q.mean_BN + variance_BN.sqrt() * torch.randn(20_000, *q.mean_BN.shape)
    log_q_SB = torch.distributions.Normal(q.mean_BN, variance_BN.sqrt()).log_prob(z_SBN).sum(-1)
    log_p_SB = torch.distributions.Normal(0.0, 1.0).log_prob(z_SBN).sum(-1)
    mean_SBT = z_SBN @ model.matrix_TN.T
    nats_SB = torch.distributions.Normal(mean_SBT, model.noise).log_prob(model.observed(batch)).sum(-1)
    constant = model.length * torch.log(torch.tensor(2 * torch.pi)) / 2
    expected_B = (nats_SB + log_p_SB - log_q_SB).mean(0)
    torch.testing.assert_close(elbo(model, batch) - constant, expected_B, atol=0.05, rtol=0)
