"""Errors of an evaluation's figures: by document, paired, and as often right as they say."""

import math
from dataclasses import replace

import pytest
import torch

from ltm_pyro.contracts import DocumentInfo, Part, ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import compare, exact_figure
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.estimators import evaluate
from ltm_pyro.inference.scores import NatsAndKL, RowScores, rate_of, summarise
from ltm_pyro.inference.state import LocalInference
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


def test_batches_that_count_their_sequences_anew_are_no_documents():
    """`make_batch` numbers the sequences of each batch from 0; errors do not depend on how texts are batched."""
    model = LinearGaussianModel(ThoughtShape(2, 1, 2))
    with torch.no_grad():
        batch = model.sample_batch(12)
    found = []
    for size in (12, 6, 1):
        parts = [batch.select(x)._replace(ids_B=torch.arange(size)) for x in torch.arange(12).split(size)]
        found.append(evaluate(model, MeanField(model), parts, LocalInference(steps=5), ["bound"], 4))
    errors = [x.estimates["bound"].stderr_nats_per_token for x in found]
    assert errors[0] > 0
    assert errors[1:] == pytest.approx([errors[0]] * 2)


def test_bits_per_byte_have_the_error_of_their_own_ratio():
    """Texts with the same bits per byte, but not the same tokens per byte: of the first there is no error."""
    bytes_B, tokens_B = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([10.0, 5.0, 6.0])
    scores = {"bound": NatsAndKL(bytes_B * math.log(2) * 3, torch.zeros(3))}
    rows = RowScores(torch.zeros(3), None, tokens_B, bytes_B, scores)
    found = rows.bits_per_byte(scores["bound"].nats_B)
    assert found.value == pytest.approx(3)
    assert found.stderr == pytest.approx(0, abs=1e-12)
    assert rate_of(scores["bound"].nats_B, tokens_B).stderr_nats_per_token > 1


def records(nats, ids=None, tokens=None):
    ids, tokens = ids or range(len(nats)), tokens or [5] * len(nats)
    return [
        {"id": i, "file": "x", "tokens": t, "bytes": 9, "bound_nats": n}
        for i, t, n in zip(ids, tokens, nats, strict=True)
    ]


def test_a_comparison_leaves_out_what_one_model_has_no_finite_figure_of():
    whole = compare(records([10.0, 20.0]), records([5.0, 10.0]))
    for gap in (math.inf, None):
        with pytest.warns(UserWarning, match="^1 of . documents have no finite"):
            assert compare(records([10.0, gap, 20.0]), records([5.0, 1.0, 10.0])) == whole
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(records([None]), records([1.0]))


def test_documents_of_the_same_id_are_paired_in_their_order():
    first, second = records([10.0, 20.0, 30.0], "aab", [1, 2, 3]), records([9.0, 18.0, 27.0], "aab", [1, 2, 3])
    assert compare(first, second).value == pytest.approx(1)
    with pytest.raises(UsageError, match="'a' has other tokens"):
        compare(first, records([9.0, 18.0, 27.0], "abb", [1, 2, 3]))


def test_the_exact_figure_is_of_the_sequences_that_have_a_score():
    exact = [DocumentInfo(n, exact_nats=5.0) for n in range(3)]
    parts = tuple((Part(n, 0, 0, document),) for n, document in enumerate(exact))
    scores = {"bound": NatsAndKL(torch.tensor([6.0, math.inf, 8.0]), torch.zeros(3))}
    rows = RowScores(torch.arange(3), parts, torch.full((3,), 2.0), torch.ones(3), scores)
    with pytest.warns(UserWarning, match="left out"):
        evaluation = replace(summarise(rows, [4], {"bound": True}, 0), rows=rows)
    found = exact_figure(evaluation)
    assert found.excess["bound"].nats_per_token == pytest.approx(1)
    assert found.rate.nats_per_token == 2.5
