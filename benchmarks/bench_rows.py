"""Tokens of text per second of training: rows of documents against rows of a stream, in turn, step by step.

    python benchmarks/bench_rows.py --input CORPUS.jsonl --seq-len 256 --steps 40

A batch of documents has as many tokens with its padding as one of the stream; only tokens of text count.
"""

import argparse
import json
import tempfile
import time
from itertools import cycle
from pathlib import Path

import torch

from ltm_pyro.contracts import Batch
from ltm_pyro.data import pack
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.local import training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel
from ltm_pyro.studies.bench.clock import machine, median_interval
from ltm_pyro.training.datamodule import PackedData

LAYOUTS = ("documents", "stream")


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", help="text to pack, as for `ltm data pack`")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    if not arguments.input:
        print("not run: name text with --input")
        return
    with tempfile.TemporaryDirectory() as folder:
        packed = {rows: str(Path(folder, rows)) for rows in LAYOUTS}
        for rows in LAYOUTS:
            pack([arguments.input], packed[rows], tokenizer="bpe:1024", seq_len=arguments.seq_len, rows=rows)
        data = {rows: PackedData(place, batch_size=arguments.batch_size) for rows, place in packed.items()}
        batches = {rows: cycle(module.train_dataloader()) for rows, module in data.items()}
        decoder = Decoder(1024, layers=3, width=128, heads=4, thoughts=4, window=64, length=arguments.seq_len)
        model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder)
        guide, inference = MeanField(model), LocalInference(steps=8, slow_gradient="last")
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)

        def step(batch: Batch) -> float:
            start = time.perf_counter()
            training_loss(model, guide, batch, inference).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - start

        seconds: dict[str, list[float]] = {rows: [] for rows in LAYOUTS}
        text: dict[str, list[int]] = {rows: [] for rows in LAYOUTS}
        slots = dict.fromkeys(LAYOUTS, 0)
        for rows in LAYOUTS:
            step(next(batches[rows]))
        for _ in range(arguments.steps):
            for rows in LAYOUTS:
                batch = next(batches[rows])
                seconds[rows].append(step(batch))
                text[rows].append(int(batch.tokens_B.sum()))
                slots[rows] += batch.mask_BT.numel()
    rate = {rows: [n / t for n, t in zip(text[rows], seconds[rows], strict=True)] for rows in LAYOUTS}
    ratio = median_interval([a / b for a, b in zip(rate["documents"], rate["stream"], strict=True)])
    report = {
        "machine": machine(),
        "padding": {rows: 1 - sum(text[rows]) / slots[rows] for rows in LAYOUTS},
        "tokens_per_second": {rows: sum(text[rows]) / sum(seconds[rows]) for rows in LAYOUTS},
        "documents_over_stream": ratio,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
