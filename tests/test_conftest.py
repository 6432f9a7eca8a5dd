"""The ground itself: shapes are really checked."""

import pytest
import torch
from jaxtyping import TypeCheckError


def test_a_wrong_shape_is_refused_at_the_door(tiny_decoder):
    decoder = tiny_decoder()
    with pytest.raises(TypeCheckError):
        decoder(torch.zeros(2, 5, 8), torch.zeros(3, 2, 3, 8))  # two sequences, thoughts of three


def test_a_wrong_type_is_refused_at_the_door(tiny_decoder):
    with pytest.raises(TypeCheckError):
        tiny_decoder().stem(torch.zeros(2, 5))


def test_every_test_starts_alike():
    assert torch.get_default_dtype() == torch.float64
    assert torch.initial_seed() == 0
