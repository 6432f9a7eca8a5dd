"""`TokenCategorical` against torch's `Categorical`, token by token."""

import torch
from torch.distributions import Categorical

from ltm_pyro.nn.token_categorical import TokenCategorical

B, T, D, V = 3, 5, 4, 11


def random_tokens(*lead):
    hidden, embedding = torch.randn(*lead, B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    mask = torch.arange(T) < torch.tensor([[5], [3], [1]])
    return TokenCategorical(hidden, embedding, mask), torch.randint(V, (B, T))


def test_log_prob_equals_torchs_categorical():
    tokens, value = random_tokens()
    expected = (Categorical(logits=tokens.logits).log_prob(value) * tokens.mask_BT).sum(-1)
    torch.testing.assert_close(tokens.log_prob(value), expected)


def test_leading_particle_axes():
    tokens, value = random_tokens(7)
    assert (tokens.batch_shape, tokens.event_shape) == ((7, B), (T,))
    expected = (Categorical(logits=tokens.logits).log_prob(value) * tokens.mask_BT).sum(-1)
    torch.testing.assert_close(tokens.log_prob(value), expected)


def test_padding_does_not_count():
    tokens, value = random_tokens()
    other = torch.where(tokens.mask_BT, value, (value + 1) % V)
    torch.testing.assert_close(tokens.log_prob(other), tokens.log_prob(value))


def test_gradients_equal_those_of_the_categorical():
    tokens, value = random_tokens()
    leaves = (tokens.hidden_BTD, tokens.embedding_VD)
    expected = (Categorical(logits=tokens.logits).log_prob(value) * tokens.mask_BT).sum()
    ours, theirs = (torch.autograd.grad(x, leaves) for x in (tokens.log_prob(value).sum(), expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_is_summed_in_single_precision():
    tokens, value = random_tokens()
    half = TokenCategorical(tokens.hidden_BTD.bfloat16(), tokens.embedding_VD.bfloat16(), tokens.mask_BT)
    assert half.log_prob(value).dtype == torch.float32
    torch.testing.assert_close(half.log_prob(value).double(), tokens.log_prob(value), rtol=0.05, atol=0.1)


def test_samples_follow_the_logits():
    tokens, _ = random_tokens()
    drawn = tokens.sample((4000,))
    assert drawn.shape == (4000, B, T)
    frequency = torch.nn.functional.one_hot(drawn, V).double().mean(0)
    probability = tokens.logits.softmax(-1)
    error = 5 * (probability * (1 - probability) / 4000).sqrt() + 1e-9
    assert ((frequency - probability).abs() < error).all()


def test_expand_adds_leading_axes():
    tokens, value = random_tokens()
    wide = tokens.expand((2, B))
    torch.testing.assert_close(wide.log_prob(value)[1], tokens.log_prob(value))
