"""`ltm generate RUN`: generates text from the prior, after a prompt, or between two texts."""

import argparse
import re
from contextlib import suppress
from dataclasses import replace
from itertools import cycle
from typing import Any

from ltm_pyro.cli.arguments import add_device, add_seed, add_trust, at_least
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json

GAP = re.compile(r"\[\[([0-9]{1,6})\]\]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm generate`."""

    def layers(text: str) -> tuple[int, ...]:
        return tuple(at_least(1)(layer.strip()) for layer in text.split(","))

    parser.add_argument("run", metavar="RUN", help="run directory, checkpoint or exported model")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to continue; without it z is from the prior")
    parser.add_argument("--interpolate", nargs=2, metavar="TEXT", help="interpolate between the thoughts of two texts")
    about = "text with gaps to fill, [[N]] for one of N tokens: for runs of masked diffusion"
    parser.add_argument("--infill", metavar="TEXT", help=about)
    about = "of masked diffusion: fill a text in N steps; by default token by token"
    parser.add_argument("--denoising-steps", type=at_least(1), metavar="N", help=about)
    parser.add_argument("--num-samples", type=at_least(1), default=1, metavar="N", help="texts to generate, one z each")
    add_seed(parser, "random seed of z and of the tokens")
    parser.add_argument("--stream", action="store_true", help="print the text while it is generated")
    about = "compile the decoder: half a minute first, then single texts are generated twice as fast"
    parser.add_argument("--compile", action="store_true", help=about)
    add_device(parser)
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    tokens = parser.add_argument_group("tokens, as in Hugging Face's generate")
    about = "tokens after the prompt; the model's length ends a text earlier"
    tokens.add_argument("--max-new-tokens", type=at_least(1), default=64, metavar="N", help=about)
    tokens.add_argument("--greedy", action="store_true", help="take the most likely token, do not sample")
    tokens.add_argument("--temperature", type=float, default=1.0, metavar="X", help="divide the logits by X")
    tokens.add_argument(
        "--top-k", type=at_least(0), default=0, metavar="N", help="only the N most likely tokens; 0 for all"
    )
    tokens.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="only the most likely tokens of total probability X"
    )
    tokens.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="at least X times the highest probability"
    )
    tokens.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="penalty on earlier tokens; 1 for none"
    )
    tokens.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop after TEXT; can be repeated")
    rethinking = parser.add_argument_group("rethinking: write again with thoughts that have seen what was written")
    rethinking.add_argument("--rethink", type=at_least(1), metavar="N", help="iterations after the first draft")
    about = "what the loop samples from: the paper's loop, exact Gibbs sampling, or nothing but new draws"
    rethinking.add_argument("--target", choices=("rethink", "gibbs", "ancestral"), default="rethink", help=about)
    rethinking.add_argument("--chains", type=at_least(1), default=1, metavar="C", help="independent loops")
    about = "the draft that is printed: the last, or that with the highest ELBO or likelihood, or of most chains"
    rethinking.add_argument("--keep", choices=("last", "elbo", "likelihood", "majority"), default="last", help=about)
    about = "stop once no draft has changed for N iterations"
    rethinking.add_argument("--patience", type=at_least(1), metavar="N", help=about)
    thoughts = parser.add_argument_group("thoughts")
    about = "label of the document, for a prior that asks for it; can be repeated"
    thoughts.add_argument("--label", action="append", default=[], metavar="NAME=VALUE", help=about)
    thoughts.add_argument("--fast-steps", type=at_least(0), metavar="N", help="steps per fit; by default the recipe's")
    thoughts.add_argument(
        "--candidates",
        type=at_least(1),
        default=1,
        metavar="N",
        help="draws of z, of which one is kept by importance weight",
    )
    thoughts.add_argument("--refit-every", type=at_least(0), default=0, metavar="N", help="fit q again every N tokens")
    thoughts.add_argument(
        "--layers",
        type=layers,
        metavar="1,2,…",
        help="layers that use their thoughts, counted from 1 among those with thoughts; all by default",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the generated texts; returns 0."""
    _check(args)
    from ltm_pyro.runs.load import load_run
    from ltm_pyro.text.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        do_sample=not args.greedy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        num_return_sequences=1 if args.interpolate else args.num_samples,
        stop_strings=tuple(args.stop),
    )
    trained = load_run(args.run, args.device, args.trust)
    if args.rethink:
        return _rethink(trained, args, sampling)
    try:
        texts = _texts(trained, args, sampling)
    except RuntimeError as error:
        if not args.compile:
            raise
        first = str(error).strip().partition("\n")[0]
        raise UsageError(f"--compile does not work on this machine ({first}): leave it out.") from None
    if args.json:
        given = {"interpolate": args.interpolate} if args.interpolate else {"prompt": args.prompt}
        given = given if args.infill is None else {"infill": args.infill}
        print_json({**given, "samples": texts})
    elif args.stream:
        print()
    else:
        print("\n---\n".join(args.prompt + text for text in texts))
    return 0


def _rethink(trained: Any, args: argparse.Namespace, sampling: Any) -> int:
    """Prints the text that is kept of all drafts, or as JSON all of them with their figures."""
    from rich.progress import Progress

    from ltm_pyro.text.rethinking import Rethinking, rethink
    from ltm_pyro.utils.console import Console

    steps = trained.inference.steps if args.fast_steps is None else args.fast_steps
    rethinking = Rethinking(
        iterations=args.rethink,
        target=args.target,
        chains=args.chains,
        keep=args.keep,
        patience=args.patience,
        inference=replace(trained.inference, steps=steps),
        labels=_labels(args.label),
    )
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rethinking", total=args.rethink + 1)
        (found,) = rethink(
            trained, [args.prompt], rethinking, sampling, seed=args.seed, progress=lambda _: bar.advance(task)
        )
    if args.json:
        figures = {name.removesuffix("_NC"): x.tolist() for name, x in found._asdict().items() if name.endswith("_NC")}
        print_json({"prompt": args.prompt, "text": found.text, "drafts": found.drafts, **figures})
    else:
        kept = found.drafts[-1] if args.keep == "last" else [found.text]  # the last draft of each chain
        print("\n---\n".join(args.prompt + text for text in kept))
    return 0


def _texts(trained: Any, args: argparse.Namespace, sampling: Any) -> list[str]:
    from ltm_pyro.text.generation import generate, infill, interpolate
    from ltm_pyro.text.streaming import TextStreamer
    from ltm_pyro.text.thoughts import ThoughtSampling

    if args.infill is not None:
        parts = [int(x) if odd else x for odd, x in zip(cycle([0, 1]), GAP.split(args.infill), strict=False)]
        given = [part for part in parts if part != ""]
        return infill(trained, given, sampling, seed=args.seed, denoising_steps=args.denoising_steps)
    steps = trained.inference.steps if args.fast_steps is None else args.fast_steps
    thought_sampling = ThoughtSampling(
        inference=replace(trained.inference, steps=steps),
        candidates=args.candidates,
        refit_every=args.refit_every,
        layers=args.layers,
        labels=_labels(args.label),
    )
    if args.interpolate:
        ends, points = tuple(args.interpolate), args.num_samples
        return interpolate(trained, ends, points, sampling, thought_sampling, args.seed, args.compile)
    if args.stream:
        print(args.prompt, end="", flush=True)
    streamer = TextStreamer(trained.tokenizer) if args.stream else None
    options = {"seed": args.seed, "compile": args.compile, "denoising_steps": args.denoising_steps}
    return generate(trained, args.prompt, sampling, thought_sampling, streamer=streamer, **options)


def _labels(given: list[str]) -> dict[str, str | int | float]:
    """Labels by name; a value that is a number counts as one, as in JSON."""
    labels: dict[str, str | int | float] = {}
    for text in given:
        name, found, value = text.partition("=")
        if not (name and found and value):
            raise UsageError(f"--label {text} is not NAME=VALUE: write for example --label source=news.")
        if name in labels:
            raise UsageError(f"--label {name} is given twice, as {labels[name]} and {value}: leave one out.")
        labels[name] = value
        for number in (float, int):
            with suppress(ValueError):
                labels[name] = number(value)
    return labels


def _check(args: argparse.Namespace) -> None:
    if args.infill is not None and (args.prompt or args.stream or args.interpolate or args.compile):
        raise UsageError("--infill does not go with --prompt, --stream, --interpolate and --compile: leave them out.")
    if args.interpolate and (args.prompt or args.stream or args.refit_every):
        raise UsageError("--interpolate does not go with --prompt, --stream and --refit-every: leave them out.")
    alone = {"--target": "rethink", "--chains": 1, "--keep": "last", "--patience": None}
    if unused := [name for name, default in alone.items() if getattr(args, name[2:]) != default and not args.rethink]:
        raise UsageError(f"{unused[0]} has no effect without --rethink N: add it, or leave {unused[0]} out.")
    if args.rethink and (
        args.infill is not None
        or args.interpolate
        or args.stream
        or args.refit_every
        or args.layers
        or args.candidates > 1
        or args.num_samples > 1
        or args.compile
        or args.denoising_steps
    ):
        raise UsageError(
            "--rethink does not go with --infill, --interpolate, --stream, --refit-every, --layers, --candidates, "
            "--num-samples, --compile and --denoising-steps: leave them out; --chains runs several loops."
        )
    if args.stream and args.json:
        raise UsageError("--stream prints text at once, --json one object at the end: choose one of them.")
    for name, text in (
        ("--prompt", args.prompt),
        ("--infill", args.infill or ""),
        *(("--interpolate", text) for text in args.interpolate or []),
    ):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{name} {text!r} is not UTF-8 (at character {error.start}): re-encode it.") from None
