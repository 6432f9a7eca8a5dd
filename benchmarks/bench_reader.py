"""How many tokens per second the data loader delivers, by sequence length and number of worker processes.

usage: bench_reader.py [--tokens N]      packs invented text in a temporary folder; loads it for one epoch each
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch

from ltm_pyro.data import pack
from ltm_pyro.data.speed import reading_speed


def write_text(path: Path, tokens: int) -> None:
    """Some words of common lengths, about one token each."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 4))) for _ in range(300)]
    texts = (" ".join(rng.choices(words, k=500)) for _ in range(tokens // 500))
    path.write_text("\n\n\n".join(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| tokens a sequence | processes | million tokens per second |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder, "a.txt"), options.tokens)
        for seq_len in (128, 1024):
            out = Path(folder, f"{seq_len}")
            pack([Path(folder, "a.txt")], out, tokenizer="bpe:1024", seq_len=seq_len)
            for workers in (0, 1, 2):
                speed = reading_speed(out, workers, 4096 // seq_len * 4)
                print(f"| {seq_len} | {workers or 'in training'} | {speed / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
