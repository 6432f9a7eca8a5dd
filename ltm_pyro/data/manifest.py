"""The manifest of a pack, `manifest.json`: every shard is checked against it when it is read."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ltm_pyro.data.remote import is_address, read_file
from ltm_pyro.errors import UsageError

Layout = Literal["documents", "stream"]
SPLITS = ("train", "val", "test", "harder")  # the last is of problem tasks
LARGEST = 2**27  # bytes of a manifest, or of a tokenizer
LARGEST_SHARD = 2**32  # bytes; a shard is read as a whole
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = 3
OLD = 2  # read as a stream whose rows do not know their documents


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file: its SHA-256 and size in bytes; how many sequences, tokens and UTF-8 bytes of text it holds."""

    file: str
    sha256: str
    size: int
    sequences: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part of the corpus; tokens count one `END_OF_TEXT` for each document and no padding, bytes are UTF-8.

    ``lengths`` is the SHA-256 of the file that has the tokens of every row; None in a stream, whose rows are full.
    """

    documents: int
    sequences: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]
    lengths: str | None = None

    @classmethod
    def of(cls, documents: int, shards: tuple[Shard, ...], lengths: str | None = None) -> "Split":
        """The split of ``shards``, with their sums."""
        sums = {name: sum(getattr(shard, name) for shard in shards) for name in ("sequences", "tokens", "bytes")}
        return cls(documents=documents, shards=shards, lengths=lengths, **sums)


@dataclass(frozen=True, kw_only=True)
class Label:
    """A label of the documents: ``number``, ``category`` with its ``values``, or ``text``, which has too many to list.

    ``values`` are sorted by how they look in JSON.
    """

    kind: str
    values: tuple[str | int | float | bool, ...] = ()


MOST_VALUES, MOST_CHARACTERS = 10_000, 2**20  # that the manifest lists of one label, as JSON


class LabelValues:
    """The different values of a label, in bounded memory; 1, "1" and True are different."""

    def __init__(self) -> None:
        self._found: dict[str, str | int | float | bool] = {}  # by how they look in JSON
        self._characters, self._are_numbers, self._are_all = 0, True, True

    def add(self, value: str | int | float | bool | None) -> None:
        """Takes the value of one more document; None is none."""
        if value is None:
            return
        self._are_numbers &= not isinstance(value, str | bool)
        key = json.dumps(value)
        if self._are_all and key not in self._found:
            self._characters += len(key)
            self._are_all = len(self._found) < MOST_VALUES and self._characters <= MOST_CHARACTERS
            if self._are_all:
                self._found[key] = value

    def label(self) -> Label | None:
        """What kind of label they are; None if no document has one."""
        if not self._found and self._are_all:
            return None
        if self._are_numbers:
            return Label(kind="number")
        if not self._are_all:
            return Label(kind="text")
        return Label(kind="category", values=tuple(self._found[key] for key in sorted(self._found)))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A pack: at most ``seq_len`` tokens a row, over a vocabulary of V tokens, by split (`SPLITS`).

    ``rows`` says whether a row is one document (or a piece of it), or cut out of a stream of them. ``dropped`` counts
    the documents left out as duplicates of others, ``prompts`` those that have a prompt; ``exact`` says whether
    −log p(x) of every document is known. ``task`` is what `ltm data make` was asked for, the ``name`` of a task and its
    ``options``: to be shown, and never looked up.
    """

    format: int
    tokenizer_hash: str
    vocabulary: int
    seq_len: int
    dropped: int
    splits: dict[str, Split]
    rows: Layout = "stream"
    labels: dict[str, Label] = field(default_factory=dict)
    prompts: int = 0
    exact: bool = False
    task: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON values; ``task`` only where there is one, so that older digests stay the same."""
        return {name: value for name, value in asdict(self).items() if name != "task" or value}

    @property
    def digest(self) -> str:
        """The first 64 bits of the manifest's SHA-256 in hexadecimal; it covers every shard, whose hashes are in it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def split(self, name: str, place: str | Path) -> Split:
        """One split of the pack at ``place``; raises `UsageError` if it has no such split."""
        if name not in self.splits:
            again = f", or pack the text again with a --{name}-fraction above 0" if name in ("val", "test") else ""
            known = " or ".join(split for split in SPLITS if split in self.splits)
            raise UsageError(f"pack {place} has no split {name!r}: choose {known}{again}.")
        return self.splits[name]

    def need_documents(self, place: str | Path, what: str) -> None:
        """Raises `UsageError` unless every row knows its document, which ``what`` needs."""
        if self.rows != "documents":
            raise UsageError(
                f"{what} needs rows of documents, and those of the pack {place} are cut out of a stream: pack the text "
                f"again with --rows documents."
            )


def is_pack(place: str | Path) -> bool:
    """Whether ``place`` is a pack, that is, has a manifest; an address always counts as one."""
    return is_address(place) or (Path(place) / MANIFEST).is_file()


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Writes `manifest.json` into ``directory``."""
    (directory / MANIFEST).write_text(json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_manifest(place: str | Path) -> Manifest:
    """The manifest of the pack at ``place``; raises `UsageError` if it is missing or invalid."""
    path = f"{place}/{MANIFEST}"
    if not is_pack(place) and not str(place).startswith("pipe:"):
        raise UsageError(f"{place} is not a packed corpus (no {MANIFEST}); make one with `ltm data pack`.")
    try:
        raw = json.loads(read_file(place, MANIFEST, LARGEST))
        _check_format(raw["format"], path)
        splits = {name: _split(split) for name, split in raw.pop("splits").items()}
        labels = {name: Label(kind=x["kind"], values=tuple(x["values"])) for name, x in raw.pop("labels", {}).items()}
        manifest = Manifest(**raw, splits=splits, labels=labels)
        _check(manifest)
        return manifest
    except UsageError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"{path} cannot be read as a manifest ({reason}); pack the text again.") from error


def _check_format(found: int, path: str) -> None:
    if found > FORMAT:
        raise UsageError(f"{path} has format {found}, newer than the {FORMAT} of this version: update ltm_pyro.")
    if found < OLD:
        raise UsageError(f"{path} has format {found}, and this version reads {OLD} to {FORMAT}; pack the text again.")


def _check(manifest: Manifest) -> None:
    """Raises `ValueError` for what no pack can have, so that memory and file names do not depend on such numbers."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    counts = (manifest.seq_len, manifest.vocabulary, *(x for s in shards for x in (s.size, s.sequences, s.tokens)))
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError("a count is no whole number above 0")
    sums = (manifest.dropped, manifest.prompts, *(x.bytes for x in shards))
    if not all(type(x) is int and x >= 0 for x in (*sums, *(x.documents for x in manifest.splits.values()))):
        raise ValueError("a count is no whole number")
    if max(manifest.seq_len, manifest.vocabulary) > 2**32:
        raise ValueError(f"{max(manifest.seq_len, manifest.vocabulary)} is more than a token's number can be")
    if manifest.rows not in get_args(Layout):
        raise ValueError(f"rows are {manifest.rows!r}")
    plain = {"name": str, "options": dict} if manifest.task else {}
    if {name: type(x) for name, x in manifest.task.items()} != plain or not all(
        isinstance(x, str | int | float) for x in manifest.task.get("options", {}).values()
    ):
        raise ValueError("its task is no name with options")
    if unknown := manifest.splits.keys() - {*SPLITS}:
        raise ValueError(f"there is a split {min(unknown)!r}, and none but {', '.join(SPLITS)} exist")
    for split in manifest.splits.values():
        if not split.shards or split != Split.of(split.documents, split.shards, split.lengths):
            raise ValueError("a split's counts are not its shards'")
        if (manifest.rows == "documents") != (split.lengths is not None):
            raise ValueError("rows of documents have a file of lengths, and others have none")
        digests = [shard.sha256 for shard in split.shards] + ([] if split.lengths is None else [split.lengths])
        if not all(isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) for x in digests):
            raise ValueError("a SHA-256 is none")
    for shard in shards:
        if shard.size > LARGEST_SHARD:
            raise ValueError(f"a shard has {shard.size:,} bytes, and {LARGEST_SHARD:,} are the most")
        if not shard.sequences <= shard.tokens <= min(shard.sequences * manifest.seq_len, shard.size // 2):
            raise ValueError(f"{shard.tokens} tokens are not in {shard.sequences} rows and {shard.size} bytes")
    if manifest.rows == "stream" and manifest.seq_len > max(split.tokens for split in manifest.splits.values()):
        raise ValueError(f"no split fills a row of {manifest.seq_len} tokens")


def _split(raw: dict[str, Any]) -> Split:
    return Split(**raw | {"shards": tuple(Shard(**shard) for shard in raw["shards"])})
