"""`ltm COMMAND …`: finds the command, and turns what a user got wrong into one sentence and exit code 2."""

import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path

from ltm_pyro.utils.malloc import keep_freed_memory

COMMANDS = {  # name -> module and the line of help
    "data pack": ("ltm_pyro.cli.data", "text, JSONL, Parquet or a data set -> token shards"),
    "data verify": ("ltm_pyro.cli.data_verify", "is every shard of a pack what its manifest says?"),
    "data show": ("ltm_pyro.cli.data_show", "what is in a pack: counts, lengths, decoded samples"),
    "fit": ("ltm_pyro.cli.fit", "train as a recipe says"),
    "evaluate": ("ltm_pyro.cli.evaluate", "score held-out text: bounds, perplexity, bits per byte"),
    "generate": ("ltm_pyro.cli.generate", "write text, freely or behind a prompt"),
    "posterior": ("ltm_pyro.cli.posterior", "the thoughts of every text, with their diagnostics, as netCDF"),
    "calibrate": ("ltm_pyro.cli.calibrate", "does q cover the truth on the model's own texts?"),
    "report": ("ltm_pyro.cli.report", "every diagnostic of a posterior on one page of HTML"),
    "compare": ("ltm_pyro.cli.compare", "priors and guides trained for the same time, side by side"),
    "show": ("ltm_pyro.cli.show", "sites, shapes and plate diagram of a run or a recipe"),
    "new": ("ltm_pyro.cli.new", "a commented prior, guide or study to start from, with a test"),
    "export": ("ltm_pyro.cli.export", "a run as safetensors, recipe, tokenizer and model card"),
    "check-inference": ("ltm_pyro.cli.check_inference", "every guide against known posteriors and evidences"),
    "bench": ("ltm_pyro.cli.bench", "speed and memory beside the published structure, on this machine"),
    "flops": ("ltm_pyro.cli.flops", "what a recipe costs per token"),
    "study run": ("ltm_pyro.cli.study", "search settings at equal training budgets, on any number of machines"),
    "study list": ("ltm_pyro.cli.study", "the studies in a storage"),
    "study show": ("ltm_pyro.cli.study", "a study's trials, failed and pruned ones with the reason"),
    "study report": ("ltm_pyro.cli.study", "a study as a page: pictures, trials and the recommended setting"),
    "study best": ("ltm_pyro.cli.study", "write the recommended setting as a recipe for `ltm fit`"),
}

PACKAGES = {"ltm_pyro": "ltm-pyro", "torch": "torch", "pyro": "pyro-ppl"}  # module -> distribution


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 2 the user can mend it, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--version"]:
        print(", ".join(f"{name} {version(package)}" for name, package in PACKAGES.items()))
        sys.exit(0)
    name, rest = _split(arguments)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, for a user's own modules
    from ltm_pyro.errors import UsageError

    keep_freed_memory()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be no UTF-8, and a terminal know fewer letters
    warnings.filterwarnings("ignore", module="pyro|pytorch_lightning|torch")
    try:
        sys.exit(_call(name, rest))
    except UsageError as error:
        print(f"ltm {name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interruption:
        print(f"\nltm {name}: {interruption or 'interrupted.'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        sys.exit(1)


def _call(name: str, rest: list[str]) -> int:
    module, help_line = COMMANDS[name]
    command = import_module(module)
    if name == "fit":  # Lightning's conventions, parsed by jsonargparse
        return command.run(rest)
    from ltm_pyro.cli.arguments import Help, Parser

    parser = Parser(prog=f"ltm {name}", description=f"{help_line}.", allow_abbrev=False, formatter_class=Help)
    command.add_arguments(parser)
    return command.run(parser.parse_args(rest))


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name and its arguments; prints the list of commands and exits where there is none."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    said = [word for word in arguments[:2] if not word.startswith("-")]
    listed = {name: line for name, (_, line) in COMMANDS.items() if not said or name.startswith(f"{said[0]} ")}
    if said and (not listed or len(said) == 2):
        print(f"ltm: there is no command '{' '.join(said)}'; `ltm --help` lists them.", file=sys.stderr)
        sys.exit(2)
    print("usage: ltm COMMAND [options]   (ltm COMMAND --help says which; ltm --version)\n")
    print("\n".join(f"  {name:<17}{line}" for name, line in listed.items()))
    sys.exit(0)
