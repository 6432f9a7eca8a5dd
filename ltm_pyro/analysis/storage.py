"""Atomic writing of `xarray.DataTree` as netCDF or zarr, and reading with a check of kind and format version."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import xarray as xr

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import atomic_write, local_path, remove, writing

FORMAT = "2"
VARIABLES = "ltm_pyro_variables"  # an attribute: the axes of every variable by its path, as JSON


def write_tree(tree: xr.DataTree, path: str | Path) -> None:
    """Writes netCDF, or zarr if the name ends in ``.zarr``; an old file is replaced once the new one is whole.

    netCDF is made in memory first, because the HDF5 library ends the process when the disk is full.
    """
    path = local_path(path, "--out")
    if path.is_dir() and not is_store(path):
        raise UsageError(f"{path} is a folder: choose another --out.")
    tree = tree.copy()
    tree.attrs[VARIABLES] = variables_of(tree)
    with writing(path), atomic_write(path) as new:
        if path.suffix == ".zarr":
            tree.to_zarr(new, mode="w", consolidated=False)
        else:
            new.write_bytes(tree.to_netcdf(None, engine="h5netcdf", encoding=_encoding(tree)))
        remove(path)  # an old zarr store is a folder, which is not replaced


def is_store(path: Path) -> bool:
    """Whether a path is a zarr store, which is a folder."""
    return path.suffix == ".zarr" and any((path / name).exists() for name in ("zarr.json", ".zgroup"))


def read_tree(path: str | Path, kind: str) -> xr.DataTree:
    """Reads a tree of the kind ``posterior`` or ``calibration`` into memory."""
    path = local_path(path, kind)
    if not path.exists():
        raise UsageError(f"There is no {kind} at {path}: write one first (see `ltm --help`).")
    how: dict[str, Any] = {}
    try:
        if path.suffix == ".zarr":  # format 3, as `write_tree` writes; filters of format 2 may unpickle
            elsewhere = _outside_folder(path)
            how |= {"engine": "zarr", "consolidated": False, "zarr_format": 3}
        else:
            elsewhere = _outside_file(path)
            how |= {"engine": "h5netcdf"}
        tree = None
        if elsewhere is None:
            with xr.open_datatree(path, **how) as stored:
                tree = stored.load()
    except Exception:  # the exception depends on the engine
        raise UsageError(f"{path} cannot be read as netCDF or zarr: give a file that ltm wrote.") from None
    if tree is None:
        raise UsageError(f"{path} has {elsewhere} in another file, which is not read: give a file that ltm wrote.")
    found = tree.attrs.get(f"ltm_pyro_{kind}")
    if found is None:
        raise UsageError(f"{path} is not a {kind} of ltm_pyro: give a file that ltm wrote.")
    if str(found) != FORMAT:
        raise UsageError(f"{path} has format {found}, and this version reads {FORMAT}: write it again.")
    before, now = (json.loads(x) for x in (tree.attrs.pop(VARIABLES, "{}"), variables_of(tree)))
    for name, axes in before.items():
        if name.rpartition("/")[0] in tree.groups and now.get(name) != axes:
            problem = f"has no {name}" if name not in now else f"has {name} with other axes"
            raise UsageError(
                f"{path} {problem}, which was there when it was written: give it as it was, or write it again."
            )
    return tree


def variables_of(tree: xr.DataTree) -> str:
    """The axes of every variable by its path, as JSON."""
    found = {f"{node.path}/{name}": list(x.dims) for node in tree.subtree for name, x in node.data_vars.items()}
    return json.dumps(found, sort_keys=True)


def _outside_folder(store: Path) -> str | None:
    """The first part of a zarr store that is a link out of its folder."""
    home = store.resolve()
    return next((x.name for x in store.rglob("*") if not x.resolve().is_relative_to(home)), None)


def _outside_file(path: Path) -> str | None:
    """The first part of an HDF5 file that is in another one: external links and storage, and virtual data sets."""
    with h5py.File(path, "r") as file:
        waiting: list[Any] = [file]
        seen: set[int] = set()
        while waiting:
            group = waiting.pop()
            for name in group:
                link = group.get(name, getlink=True)
                if isinstance(link, h5py.ExternalLink):
                    return f"{group.name}/{name}"
                if isinstance(link, h5py.SoftLink):  # to a part of this file, which is seen at its own place
                    continue
                part = group[name]
                if isinstance(part, h5py.Dataset) and (part.external or part.is_virtual):
                    return str(part.name)
                place = h5py.h5o.get_info(part.id).addr
                if isinstance(part, h5py.Group) and place not in seen:
                    seen.add(place)
                    waiting.append(part)
    return None


def stamp(kind: str) -> dict[str, Any]:
    """The attributes that `read_tree` checks."""
    return {f"ltm_pyro_{kind}": FORMAT, "ltm_pyro": version("ltm-pyro")}


def _encoding(tree: xr.DataTree) -> dict[str, dict[str, Any]]:
    """Compression settings for all numeric variables."""
    packed = {"zlib": True, "complevel": 1, "shuffle": True}
    return {
        node.path: {str(name): packed for name, x in node.data_vars.items() if x.dtype.kind in "fi" and x.ndim}
        for node in tree.subtree
        if node.data_vars
    }
