"""What `ltm context` shows: nats by position, and by a label the map of the thoughts and what is written under them.

Shapes: T tokens.
"""

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltm_pyro.analysis.classifiers import Clusters, clusters
from ltm_pyro.analysis.draw_posterior import draw_posterior
from ltm_pyro.analysis.pictures.thoughts import plot_map
from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.analysis.probes import Probe, means, probe
from ltm_pyro.analysis.texts import Text
from ltm_pyro.evaluation.evaluate import held_out
from ltm_pyro.runs.run import Run
from ltm_pyro.studies.context import Result
from ltm_pyro.text.generation import decode, prompt_keys, write
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.utils.files import atomic_write
from ltm_pyro.utils.plotting import BLUE, GREY, ORANGE, plain

PROMPT = 24  # tokens
SAMPLING = Sampling(max_new_tokens=96, temperature=0.8, top_p=0.95)
LINES = {  # by kind of run: what it is called, its colour and its style
    "floor": ("floor: thoughts are constants", GREY, "--"),
    "thoughts": ("Latent-Thought model", BLUE, "-"),
    "ceiling": ("ceiling: full attention", ORANGE, "--"),
}


class Labelled(NamedTuple):
    """The thoughts of held-out text beside a label that the model was not told.

    ``continuations`` are of one ``prompt``, the beginning of the first text, under the thoughts of the first text of
    every class.
    """

    label: str
    posterior: Posterior
    probe: Probe
    clusters: Clusters
    prompt: str
    continuations: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain figures, for JSON."""
        found = self.clusters
        return {
            "name": self.label,
            "classes": [*found.classes],
            "probe": self.probe.thoughts.mean,
            "probe_stderr": self.probe.thoughts.stderr,
            "probe_of_tokens": self.probe.tokens.mean,
            "majority": self.probe.majority,
            "adjusted_rand": found.adjusted_rand,
            "adjusted_rand_shuffled": found.shuffled,
            "prompt": self.prompt,
            "continuations": self.continuations,
        }

    def sentences(self) -> list[str]:
        """The same in words, each figure beside its null."""
        x = self.as_dict()
        return [
            f"A linear probe of the thoughts tells the {x['name']} of {x['probe']:.1%} ± {x['probe_stderr']:.1%} of "
            f"the sequences; the most frequent one is right for {x['majority']:.1%}.",
            f"{len(x['classes'])} clusters of the thoughts agree with it by an adjusted Rand index of "
            f"{x['adjusted_rand']:.2f}; with labels shuffled among documents it is {x['adjusted_rand_shuffled']:.2f}.",
        ]


def labelled(run: Run, label: str, split: str, limit: int | None = None) -> Labelled:
    """The posterior of the first rows of a split, and what it says of a label of their documents.

    A row is read as text again; rows of white space alone are left out.
    """
    texts = []
    for row in islice(held_out(run, split), limit):
        info = row.parts[0].document
        text = run.tokenizer.decode(row.tokens_T.tolist()).replace("\0", " ")
        if text.strip():
            texts.append(Text(text, str(info.id), dict(info.labels)))
    posterior = draw_posterior(run, texts, longer="cut")
    values = ["" if x is None else str(x) for x in posterior.labels[label]]
    found = clusters(means(posterior), values, posterior.documents.tolist())
    firsts = [values.index(value) for value in found.classes]
    z_BLKD = torch.from_numpy(posterior.stats["mean"].values[firsts])
    rows = [posterior.rows[0][:PROMPT].tolist()] * len(firsts)
    written = decode(run, write(run, rows, z_BLKD, prompt_keys(run, rows, 0), SAMPLING))  # equal rows have one noise
    continuations = dict(zip(found.classes, written, strict=True))
    return Labelled(label, posterior, probe(posterior, label), found, decode(run, rows)[0], continuations)


def plot_by_position(result: Result, block: int, ax: Axes) -> Axes:
    """The nats per token of each block of tokens, predicted from what comes before it, one line a kind of run."""
    for kind, (name, colour, style) in LINES.items():
        nats = result.by_position[kind]
        before = [block * index for index in range(len(nats))]
        ax.plot(before, nats, color=colour, linestyle=style, marker="o", markersize=3, label=name)
    ax.legend(fontsize=8, frameon=False, loc="best")
    return plain(
        ax, title="What thinking about the text so far is worth", xlabel="tokens before", ylabel="nats per token"
    )


def write_picture(path: Path, result: Result, block: int, found: Labelled | None = None) -> None:
    """Nats by position, and beside them the map of the thoughts where a label was asked for."""
    figure = Figure(figsize=(11 if found else 5.6, 3.8), layout="constrained")
    panels = figure.subplots(1, 2 if found else 1, squeeze=False)[0]
    plot_by_position(result, block, panels[0])
    if found:
        plot_map(found.posterior, found.label, panels[1])
        panels[1].set_title(f"The thoughts of held-out text, by {found.label}")
    with atomic_write(path) as new:
        figure.savefig(new, dpi=150, format="png")
