"""`ltm generate RUN`: text from the prior, or behind a prompt."""

import argparse
import json

from ltm_pyro.cli.arguments import at_least
from ltm_pyro.contracts import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm generate`."""
    parser.add_argument("run", metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to continue; z comes from the prior without")
    parser.add_argument("--num-samples", type=at_least(1), default=1, metavar="N", help="texts to write, one z each")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64, metavar="N", help="tokens after the prompt")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="divides the logits")
    parser.add_argument(
        "--top-k", type=at_least(0), default=0, metavar="N", help="only the N likeliest tokens; 0 for all"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="only the likeliest tokens of this mass")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of z and of the tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Writes the texts to standard output; returns 0."""
    from ltm_pyro.generation import Sampling, generate  # here, so that --help need not wait for Lightning
    from ltm_pyro.runs import load_run

    _check_prompt(args.prompt)
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
    )
    texts = generate(load_run(args.run), args.prompt, args.num_samples, sampling, args.seed)
    if args.json:
        print(json.dumps({"prompt": args.prompt, "samples": texts}, ensure_ascii=False))
    else:
        print("\n---\n".join(args.prompt + text for text in texts))
    return 0


def _check_prompt(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"--prompt {prompt!r} is not UTF-8 (at character {error.start}): re-encode it.") from None
