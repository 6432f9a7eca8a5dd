"""How long training takes to reach a given honest bound: ours against the published structure with its settings.

    python benchmarks/bench_time_to_bound.py --data data/corpus [--ours 60] [--naive 240] [--out FILE]

The size of `prose.yaml`, on two cores. The published settings: q starts at log σ² = −5, one noise per fit, the
slow step follows the sum of all fast gradients, 16 fast steps at 0.3. Ours: the curriculum of `prose.yaml`. Both bounds
come from one procedure: q from the prior, 32 steps at 0.1, and draws made after q is final. Time for them is not
counted.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.contracts import Init, make_batch
from ltm_pyro.data import read_manifest
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.learning_rates import cosine, warmup_cosine
from ltm_pyro.inference.local import training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel
from ltm_pyro.nn.cross_entropy import token_nats
from ltm_pyro.studies.bench.clock import CLOCKS, How, machine, seconds
from ltm_pyro.studies.bench.naive import NaiveLTM, train_step
from ltm_pyro.training.datamodule import PackedData
from ltm_pyro.utils.rng import seeded

LAYERS, WIDTH, HEADS, THOUGHTS, WINDOW, LENGTH, BATCH, HELD_OUT = 2, 96, 3, 4, 16, 256, 16, 16
Curve = list[dict[str, float]]
Points = Iterator[dict[str, float]]
Nats = Callable[[Tensor, Tensor, Tensor], Tensor]  # inputs, targets, z -> −log p(x | z) of every sequence


def rows(data: PackedData) -> Iterator[Tensor]:
    """Batches of rows of targets, without end."""
    while True:
        for batch in data.train_dataloader():
            yield batch.targets_BT[:, :LENGTH]


def shifted(targets_BT: Tensor) -> Tensor:
    """The inputs of these targets."""
    return torch.cat([torch.zeros_like(targets_BT[:, :1]), targets_BT[:, :-1]], 1)


def honest_bound(nats: Nats, shape: tuple[int, ...], targets_BT: Tensor, samples: int = 4) -> float:
    """−ELBO in nats per token: Adam on a mean-field q from the prior, then ``samples`` fresh draws."""
    inputs_BT = shifted(targets_BT)
    mean, log_var = (torch.zeros(len(targets_BT), *shape, requires_grad=True) for _ in range(2))
    adam = torch.optim.Adam([mean, log_var], lr=0.1)

    def loss() -> Tensor:
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        kl = 0.5 * (log_var.exp() + mean**2 - 1 - log_var).sum()
        return (nats(inputs_BT, targets_BT, z).sum() + kl) / targets_BT.numel()

    with seeded(1):
        for step in range(32):
            adam.param_groups[0]["lr"] = 0.1 * cosine(step, 32)
            mean.grad, log_var.grad = torch.autograd.grad(loss(), [mean, log_var])
            adam.step()
        with torch.no_grad():
            return sum(loss().item() for _ in range(samples)) / samples


def curve(
    train: Callable[[float], None], bound: Callable[[], float], budget: float, how: How, points: int = 12
) -> Points:
    """The bound after every twelfth of ``budget`` seconds of training; ``train`` takes the fraction that is done."""
    spent = 0.0
    for point in range(1, points + 1):
        while spent < budget * point / points:
            spent += seconds(lambda: train(spent / budget), how)  # noqa: B023 - called at once
        yield {"seconds": spent, "bound": bound()}


def in_turn(curves: dict[str, Points]) -> dict[str, Curve]:
    """All points of all curves, one of each in turn, so that a noisy machine is noisy for all."""
    found: dict[str, Curve] = {name: [] for name in curves}
    for points in zip(*curves.values(), strict=True):
        for name, point in zip(curves, points, strict=True):
            found[name].append(point)
            print(json.dumps({"name": name, **point}), flush=True)
    return found


def naive_curve(data: PackedData, vocabulary: int, rate: float, budget: float, held_out: Tensor, how: How) -> Points:
    """The curve of the published structure."""
    model, batches = NaiveLTM(vocabulary, LAYERS, WIDTH, HEADS, WINDOW, LENGTH), rows(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def train(done: float) -> None:
        optimizer.param_groups[0]["lr"] = rate * warmup_cosine(done, 0.05, 0.1)
        targets_BT = next(batches)
        train_step(model, optimizer, shifted(targets_BT), targets_BT, THOUGHTS, steps=16, rate=0.3)

    return curve(train, lambda: honest_bound(model, (LAYERS, THOUGHTS, WIDTH), held_out), budget, how)


def our_curve(data: PackedData, vocabulary: int, budget: float, held_out: Tensor, how: How) -> Points:
    """The curve of `prose.yaml`: half the time without thoughts, then with 4 fast steps."""
    decoder = Decoder(
        vocabulary, LAYERS, WIDTH, HEADS, THOUGHTS, WINDOW, LENGTH, thought_width=16, zero_init_cross_attention=True
    )
    model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder)
    guide, batches, rate = MeanField(model), rows(data), 8e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def train(done: float) -> None:
        optimizer.param_groups[0]["lr"] = rate * warmup_cosine(done, 0.05, 0.1)
        targets_BT = next(batches)
        batch = make_batch(targets_BT, torch.full((len(targets_BT),), LENGTH), start_token=0)
        thoughts, narrow = done >= 0.5, Init(log_var=-4 + 3 * max(2 * done - 1, 0.0), jitter=0.1)
        inference = LocalInference(steps=4 if thoughts else 0, rate=0.2, init=narrow, use_thoughts=thoughts)
        (training_loss(model, guide, batch, inference).loss / targets_BT.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def nats(inputs_BT: Tensor, targets_BT: Tensor, z_BLKD: Tensor) -> Tensor:
        hidden_BTD = decoder(decoder.stem(inputs_BT), z_BLKD)
        return token_nats(hidden_BTD, decoder.embedding.weight, targets_BT).sum(1)

    def bound() -> float:
        return honest_bound(nats, tuple(decoder.thought_shape), held_out)

    return curve(train, bound, budget, how)


def reached(report: dict[str, Curve], bound: float) -> dict[str, float | None]:
    """Seconds until each curve's first point at or below ``bound``; None where it has none."""
    times = {
        name: next((point["seconds"] for point in report[name] if point["bound"] <= bound), None)
        for name in ("ours", "naive")
    }
    return {"bound": bound, **times}


def main() -> None:
    """Trains both in turn and prints when each reached the published structure's best bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a pack of at least 256 tokens a row; without it nothing is measured")
    parser.add_argument("--ours", type=float, default=60, help="seconds of training")
    parser.add_argument("--naive", type=float, default=240, help="seconds of training")
    parser.add_argument("--naive-rate", type=float, default=4e-3, help="its slow rate: ten times the published one")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, with one thread")
    parser.add_argument("--out", type=Path, help="JSON file that takes the curves")
    args = parser.parse_args()
    if args.data is None:
        print("not run: give --data, a pack of text")
        return
    data = PackedData(args.data, BATCH)
    vocabulary = read_manifest(args.data).vocabulary
    held_out = next(iter(data.val_dataloader())).targets_BT[:HELD_OUT, :LENGTH]
    report: dict[str, Any] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    how = How(clock=args.clock)
    if args.clock == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    curves = {
        "ours": our_curve(data, vocabulary, args.ours, held_out, how),
        "naive": naive_curve(data, vocabulary, args.naive_rate, args.naive, held_out, how),
    }
    report |= in_turn(curves)
    report["reached"] = [reached(report, point["bound"]) for point in report["naive"]]
    print(json.dumps(min(report["reached"], key=lambda row: row["bound"])))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
