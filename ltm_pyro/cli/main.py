"""`ltm COMMAND …`: finds and runs the command; a user's error becomes one sentence and exit code 2."""

import errno
import os
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import DISK_IS_FULL
from ltm_pyro.utils.malloc import keep_freed_memory
from ltm_pyro.utils.processes import end_at_interruption, end_with_starter, swallowed_interruptions

COMMANDS = {  # name -> module, line of help
    "data pack": ("ltm_pyro.cli.data", "pack text, JSONL, Parquet or a Hugging Face data set into token shards"),
    "data make": ("ltm_pyro.cli.data_make", "make sequences of a task whose optimum is known, as a pack"),
    "data verify": ("ltm_pyro.cli.data_verify", "compare every shard of a pack with its manifest"),
    "data show": ("ltm_pyro.cli.data_show", "print counts, document lengths and samples of a pack"),
    "fit": ("ltm_pyro.cli.fit", "train a model by a recipe"),
    "evaluate": ("ltm_pyro.cli.evaluate", "score held-out text: bounds, perplexity, bits per byte"),
    "generate": ("ltm_pyro.cli.generate", "generate text, with or without a prompt"),
    "posterior": ("ltm_pyro.cli.posterior", "infer the thoughts of texts; draws and diagnostics as netCDF"),
    "calibrate": ("ltm_pyro.cli.calibrate", "simulation-based calibration of q on generated texts"),
    "evidence": ("ltm_pyro.cli.evidence", "rank models by the evidence of the same documents, with stacking weights"),
    "report": ("ltm_pyro.cli.report", "write all diagnostics of a posterior as one HTML page"),
    "compare": ("ltm_pyro.cli.compare", "train priors and guides for the same time and compare them"),
    "baselines": ("ltm_pyro.cli.baselines", "train autoregressive models and masked diffusion beside a recipe's model"),
    "context": ("ltm_pyro.cli.context", "measure how much of what a window cannot see the thoughts carry"),
    "show": ("ltm_pyro.cli.show", "show sites, shapes and plate diagram of a run or a recipe"),
    "check-prior": (
        "ltm_pyro.cli.check_prior",
        "draw from a prior before training: its thoughts, and their effect",
    ),
    "new": ("ltm_pyro.cli.new", "write a commented prior, guide or study to start from, with a test"),
    "export": ("ltm_pyro.cli.export", "export a run as safetensors, recipe, tokenizer and model card"),
    "check-inference": ("ltm_pyro.cli.check_inference", "test every guide on known posteriors and evidences"),
    "bench": ("ltm_pyro.cli.bench", "measure speed and memory, also of the published structure"),
    "flops": ("ltm_pyro.cli.flops", "print parameters and FLOPs per token of a recipe"),
    "study run": ("ltm_pyro.cli.study", "search settings at equal training budgets, on any number of machines"),
    "study list": ("ltm_pyro.cli.study", "list the studies in a storage"),
    "study show": ("ltm_pyro.cli.study", "show a study's trials, failed and pruned ones with the reason"),
    "study report": ("ltm_pyro.cli.study", "write a study as a page: plots, trials and the recommended setting"),
    "study best": ("ltm_pyro.cli.study", "write the recommended setting as a recipe for `ltm fit`"),
    "study enqueue": ("ltm_pyro.cli.study", "add a point of your own, tried before the sampler's"),
    "study rename": ("ltm_pyro.cli.study", "give a study another name"),
    "study delete": ("ltm_pyro.cli.study", "delete a study and its trials from a storage"),
}

_OF_THE_PLACE = (  # what a path can be to blame for
    *DISK_IS_FULL,
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS),
)
INTERRUPTED = "interrupted."
PACKAGES = {"ltm_pyro": "ltm-pyro", "torch": "torch", "pyro": "pyro-ppl"}  # module -> distribution


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits: 0 if done, 2 after an error that the user can fix, 130 if interrupted."""
    end_with_starter()
    arguments = sys.argv[1:] if arguments is None else arguments
    name = ""
    code: str | int | None
    before = warnings.formatwarning
    try:
        for stream in ("stdout", "stderr"):
            if getattr(sys, stream) is None:  # closed, as by `>&-`
                setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # for paths that are not UTF-8
        try:
            if arguments[:1] == ["--version"]:
                print(", ".join(f"{module} {version(package)}" for module, package in PACKAGES.items()))
                sys.exit(0)
            name, rest = _split(arguments)
            from ltm_pyro.utils.console import guard_terminal

            guard_terminal()
            keep_freed_memory()
            os.environ["PYTHONSAFEPATH"] = "1"  # or a Python that a library starts would import from the current folder
            warnings.filterwarnings("ignore", module="pyro|pytorch_lightning|torch")
            warnings.formatwarning = lambda text, *_, **__: f"ltm {name}: warning: {text}\n"
            with swallowed_interruptions():
                code = _call(name, rest)
        except SystemExit as end:  # of `--help`, for example
            code = end.code
        sys.stdout.flush()  # or Python would tell of a closed pipe or a full disk at its end
    except UsageError as error:
        code = _failed(2, f"ltm {name}: {error}")
    except KeyboardInterrupt as interruption:
        code = _failed(130, f"\nltm {name}: {str(interruption) or INTERRUPTED}")
    except MemoryError as error:
        code = _failed(2, f"ltm {name}: There is not enough memory ({str(error) or 'of this process'}): ask for less.")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of torch, which has no class for it
            raise
        code = _failed(2, f"ltm {name}: There is not enough memory for torch's tensors: ask for less.")
    except BrokenPipeError:  # for example `ltm … | head`
        code = _failed(1)
    except OSError as error:
        if error.errno not in _OF_THE_PLACE:
            raise
        if error.errno in DISK_IS_FULL:
            place = f" under {error.filename}" if error.filename else ""
            code = _failed(2, f"ltm {name}: The disk is full{place} ({error.strerror}): make room there.")
        else:
            place = str(error.filename or "a file")
            place = place if len(place) <= 80 else f"{place[:80]}…"
            code = _failed(2, f"ltm {name}: {place} cannot be used ({error.strerror}): name another.")
    finally:
        warnings.formatwarning = before
    sys.exit(code)


def _failed(code: int, message: str = "") -> int:
    """Prints the message, gives up what is left to print if it cannot be, and returns the exit code."""
    if message:
        with suppress(OSError):
            print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _call(name: str, rest: list[str]) -> int:
    module, help_line = COMMANDS[name]
    with end_at_interruption(f"\nltm {name}: {INTERRUPTED}\n"):
        command = import_module(module)
    if name == "fit":  # has Lightning's conventions and is parsed by jsonargparse
        return command.run(rest)
    from ltm_pyro.cli.arguments import Help, Parser

    parser = Parser(prog=f"ltm {name}", description=f"{help_line}.", allow_abbrev=False, formatter_class=Help)
    command.add_arguments(parser)
    return command.run(parser.parse_args(rest))


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name and its arguments; without a command, prints the list of commands and exits."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    given = [word for word in arguments[:2] if not word.startswith("-")]
    listed = {name: line for name, (_, line) in COMMANDS.items() if not given or name.startswith(f"{given[0]} ")}
    if given and (not listed or len(given) == 2):
        print(f"ltm: there is no command '{' '.join(given)}'; `ltm --help` lists them.", file=sys.stderr)
        sys.exit(2)
    print("usage: ltm COMMAND [options]   (options: ltm COMMAND --help; version: ltm --version)\n")
    print("\n".join(f"  {name:<17}{line}" for name, line in listed.items()))
    sys.exit(0)
