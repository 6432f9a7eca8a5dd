"""Schedules at their end points, and groups of parameters with equal optimiser arguments."""

import math

import pytest
import torch

from ltm_pyro.inference.learning_rates import cosine, decay, interpolate, parameter_groups, warmup_cosine


def test_cosine_falls_from_one_to_nearly_zero():
    values = [cosine(step, 8) for step in range(8)]
    assert values[0] == 1
    assert values[4] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx((1 + math.cos(7 * math.pi / 8)) / 2)


@pytest.mark.parametrize(("progress", "factor"), [(0, 0), (0.05, 0.5), (0.1, 1), (0.55, 0.55), (1, 0.1), (1.2, 0.1)])
def test_warm_up_then_cosine_to_the_floor(progress, factor):
    assert warmup_cosine(progress, warmup=0.1, floor=0.1) == pytest.approx(factor)


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert warmup_cosine(0.0, warmup=0.0, floor=0.1) == 1


def test_interpolation_is_linear_and_constant_outside():
    points = [(0.2, 1.0), (0.6, 3.0), (1.0, 3.0)]
    assert [interpolate(points, x) for x in (0.0, 0.2, 0.4, 0.8, 2.0)] == pytest.approx([1, 1, 2, 3, 3])


def test_equal_arguments_share_a_group():
    named = [(name, torch.zeros(2)) for name in ("local.z_loc", "weight", "local.u_log_var", "norm.weight")]
    groups = parameter_groups(named, lambda name: {"lr": 0.3 if name.startswith("local.") else 4e-4})
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.3, 2), (4e-4, 2)]
    assert groups[0]["params"][1] is named[2][1]


def test_norms_have_no_weight_decay():
    assert decay(0.1)("decoder.blocks.0.norm_self.weight") == {"weight_decay": 0.0}
    assert decay(0.1)("decoder.embedding.weight") == {"weight_decay": 0.1}
