"""Posteriors of many texts in bounded memory: block by block into one zarr store, by one process or by several.

Every process computes blocks of its own and writes them into their regions of the store; what is complete is marked,
so that the same command goes on after it was killed. Shapes: N sequences, S draws.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
import zarr

from ltm_pyro.analysis.draw_posterior import (
    BATCH,
    DrawOptions,
    Groups,
    draw_sequences,
    number_axes,
    prepare,
    settings_of_run,
    text_groups,
)
from ltm_pyro.analysis.posterior import COMPLETE, SEQUENCES, THOUGHTS, Posterior
from ltm_pyro.analysis.storage import VARIABLES, is_store, stamp, variables_of
from ltm_pyro.analysis.texts import Longer, Piece, Text
from ltm_pyro.contracts import Guide
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.runs.run import Run
from ltm_pyro.utils.files import atomic_write, remove, writing
from ltm_pyro.utils.parallel import check_workers, parallel_map
from ltm_pyro.utils.rng import seeded

BLOCK = 16 * BATCH  # sequences (of chains a 16th) written at once: a chunk, so that no two processes share one
SETTINGS = "ltm_pyro_stream"  # the attribute that tells a store of other texts, runs or options apart
EVERY = 30.0  # seconds between two lines about progress


class Place(NamedTuple):
    """Which of several processes this one is: it computes the blocks ``rank``, ``rank + size``, …"""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "Place":
        """As torchrun says, or a SLURM array, or `srun`; one of one otherwise."""
        for rank, size, first in (
            ("RANK", "WORLD_SIZE", ""),
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
            ("SLURM_PROCID", "SLURM_NTASKS", ""),
        ):
            if rank in environment and size in environment:
                given = environment[rank], environment.get(first, "0"), environment[size]
                numbers = [int(x) if x.isdecimal() else -1 for x in given]
                found = cls(numbers[0] - numbers[1], numbers[2])
                if min(numbers) < 0 or not 0 <= found.rank < found.size:
                    raise UsageError(
                        f"{rank}={environment[rank]} of {size}={environment[size]} is no place among processes: number "
                        f"a SLURM array without gaps."
                    )
                return found
        return cls()


@seeded(0)
def stream_posterior(
    run: Run,
    texts: Sequence[str | Text],
    path: Path,
    options: DrawOptions | None = None,
    steps: int | None = None,
    guide: Guide | None = None,
    longer: Longer = "refuse",
    seed: int = 0,
    keep: int | None = None,
    place: Place = Place(),  # noqa: B008 - immutable
    replace: bool = False,
    workers: int = 1,
) -> bool:
    """`draw_posterior` into a zarr store; returns whether the store is complete, which takes all processes.

    A store of the same texts, run and options is continued. The texts and their tokens stay in memory; of the
    posteriors there is one block at a time.

    Args:
        keep: draws that are stored of each sequence, all by default; k-hat and bounds are computed from all.
        place: which blocks this process computes.
        replace: a store that is there is deleted, once it is clear that the new one can be begun.
        workers: processes on a CPU that share each block.

    Raises:
        UsageError: the store is of something else, or cannot be written.
    """
    check_workers(workers, run.device)
    options = options or DrawOptions()
    if keep is not None and keep > options.samples:
        raise UsageError(f"{keep} draws cannot be kept of {options.samples}: keep fewer, or draw more.")
    run, found = prepare(run, texts, steps, guide, longer)
    length, size = max(len(piece.tokens) for piece in found), BLOCK if options.method == "guide" else BATCH
    blocks = -(-len(found) // size)
    attrs = settings_of_run(run, options, seed)
    asked = json.dumps(
        {"what": _digest(run.inference, found, options), "keep": keep, **attrs} | {"run": ""}, sort_keys=True
    )
    with fix_global_draws(run.model, seed), writing(path):
        if replace or not path.exists():
            first = _kept(draw_sequences(run, found[:1], length, options, seed), keep)
            if replace:
                remove(path)
            _create(path, first, text_groups(run, found), size, stamp("posterior") | attrs | {SETTINGS: asked})
        if not is_store(path) or zarr.open_group(path, mode="r").attrs.get(SETTINGS) != asked:
            raise UsageError(
                f"{path} is not a store of these texts with this run and these options: choose another --out."
            )
        complete = zarr.open_array(path / "ltm_pyro" / COMPLETE, mode="r+")
        todo = [n for n in range(place.rank, blocks, place.size) if not complete[n]]
        for number in _with_progress(todo, place):
            block = found[number * size : (number + 1) * size]
            try:
                groups = draw_sequences(run, block, length, options, seed, partial(parallel_map, workers=workers))
            except KeyboardInterrupt:
                done = int(np.asarray(complete[:]).sum())
                stored = f"interrupted: {done} of {blocks} blocks are in {path}, and the same command goes on."
                raise KeyboardInterrupt(stored) from None
            finite = xr.apply_ufunc(np.isfinite, groups[SEQUENCES]["mean"]).all(THOUGHTS).values
            if not finite.all():
                raise UsageError(
                    f"The draws of text {block[int(finite.argmin())].text.document} are not finite: lower the rate, or "
                    f"leave it out and begin again."
                )
            region = {"sequence": slice(number * size, number * size + len(block))}
            for name, data in _kept(groups, keep).items():
                theirs = data.drop_vars([x for x in data.variables if "sequence" not in data[x].dims])
                if theirs.data_vars:
                    theirs.to_zarr(path, group=name, region=region, mode="r+", consolidated=False)
            complete[number] = True
        return bool(np.asarray(complete[:]).all())


def blocks_of(path: Path) -> Iterator[Posterior]:
    """The posteriors of a store's blocks, one after the other, so that one is in memory."""
    with xr.open_datatree(path, engine="zarr", consolidated=False) as stored:
        for first in range(0, stored[SEQUENCES].sizes["sequence"], BLOCK):
            part = slice(first, first + BLOCK)
            tree = stored.map_over_datasets(lambda x, part=part: x.isel(sequence=part, missing_dims="ignore").load())
            yield Posterior(tree)


def _kept(groups: Groups, keep: int | None) -> Groups:
    """The groups with the first ``keep`` draws; documents and labels are written by themselves."""
    groups = {name: x for name, x in groups.items() if name != "constant_data"}
    if keep is None:
        return groups
    whole = {name: groups.pop(name) for name in ("prior", "posterior_predictive") if name in groups}
    if keep:
        return {name: x.isel(draw=slice(keep), missing_dims="ignore") for name, x in groups.items()} | whole
    whole.pop("prior", None)  # or ArviZ would take its draws for those of the posterior
    without = {name: x.drop_dims("draw", errors="ignore") for name, x in groups.items()}
    return {name: x for name, x in without.items() if x.data_vars} | whole


def _create(path: Path, first: Groups, texts: Groups, block: int, attrs: dict[str, Any]) -> None:
    """Writes a store of the full size with texts and labels; only the first process to finish it is heard.

    A first batch says which variables there are; their arrays are then enlarged, and are empty until their block comes.
    """
    size = len(texts["constant_data"]["document"])
    try:
        with atomic_write(path) as new:
            xr.DataTree().to_zarr(new, mode="w", consolidated=False)
            root = zarr.open_group(new, mode="r+")
            for name, data in number_axes(first).items():
                chunks = {
                    x: {
                        "chunks": tuple(block if axis == "sequence" else max(n, 1) for axis, n in data[x].sizes.items())
                    }
                    for x in data.data_vars
                }
                if "sequence" in data.coords:
                    chunks["sequence"] = {"chunks": (size,)}  # else a file for each, as the first batch has one
                data.to_zarr(new, group=name, mode="a", encoding=chunks, consolidated=False)
                for variable in data.variables:
                    if "sequence" in data[variable].dims:
                        stored = root[f"{name}/{variable}"]
                        assert isinstance(stored, zarr.Array)
                        stored.resize(
                            tuple(size if axis == "sequence" else n for axis, n in data[variable].sizes.items())
                        )
                if "sequence" in data.coords:
                    numbers: Any = root[f"{name}/sequence"]
                    numbers[:] = np.arange(size)
            for name, data in number_axes(texts).items():
                data.to_zarr(new, group=name, mode="w" if name == "constant_data" else "a", consolidated=False)
            progress = xr.Dataset({COMPLETE: ("block", np.zeros(-(-size // block), bool))})
            progress.to_zarr(new, group="ltm_pyro", mode="a", encoding={COMPLETE: {"chunks": (1,)}}, consolidated=False)
            with xr.open_datatree(new, engine="zarr", consolidated=False) as whole:
                root.attrs.update(attrs | {VARIABLES: variables_of(whole)})
    except OSError:
        if not is_store(path):  # otherwise another process was first
            raise


def _with_progress(numbers: Sequence[int], place: Place) -> Iterator[int]:
    """The numbers, with a line on stderr now and then: how many are done, and the time left."""
    began = said = time.monotonic()
    for done, number in enumerate(numbers):
        now = time.monotonic()
        if done and now - said > EVERY:
            left = (now - began) / done * (len(numbers) - done)
            whose = f" of process {place.rank}" if place.size > 1 else ""
            print(f"{done} of {len(numbers)} blocks{whose} are done, about {left / 60:.0f} min left", file=sys.stderr)
            said = now
        yield number


def _digest(inference: LocalInference, found: Sequence[Piece], options: DrawOptions) -> str:
    """A digest of the options, and of the sequences with their documents and labels."""
    digest = hashlib.sha256(repr((options, inference)).encode())
    for piece in found:
        digest.update(json.dumps([piece.text.document, dict(piece.text.labels), list(piece.tokens)]).encode())
    return digest.hexdigest()
