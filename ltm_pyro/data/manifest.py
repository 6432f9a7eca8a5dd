"""The manifest of a pack, `manifest.json`: every shard is checked against it when it is read."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltm_pyro.data.remote import is_address, read_file
from ltm_pyro.errors import UsageError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = 2


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
    """One part of the corpus; tokens count one `END_OF_TEXT` for each document and no padding, bytes are UTF-8."""

    documents: int
    sequences: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, documents: int, shards: tuple[Shard, ...]) -> "Split":
        """The split of ``shards``, with their sums."""
        sums = {name: sum(getattr(shard, name) for shard in shards) for name in ("sequences", "tokens", "bytes")}
        return cls(documents=documents, shards=shards, **sums)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A pack: ``seq_len`` tokens a sequence, over a vocabulary of V tokens, by split (``"train"``, ``"val"``).

    ``dropped`` counts the documents left out as duplicates of others.
    """

    format: int
    tokenizer_hash: str
    vocabulary: int
    seq_len: int
    dropped: int
    splits: dict[str, Split]

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """The first 64 bits of the manifest's SHA-256 in hexadecimal; it covers every shard, whose hashes are in it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def split(self, name: str, place: str | Path) -> Split:
        """One split of the pack at ``place``; raises `UsageError` if it has no such split."""
        if name not in self.splits:
            raise UsageError(
                f"pack {place} has no split {name!r} but {sorted(self.splits)}; pack the text again with one."
            )
        return self.splits[name]


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
        raw = json.loads(read_file(place, MANIFEST))
        _check_format(raw["format"], path)
        splits = {name: _split(split) for name, split in raw.pop("splits").items()}
        manifest = Manifest(**raw, splits=splits)
        _check_counts(manifest)
        return manifest
    except UsageError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{path} cannot be read as a manifest ({error!r}); pack the text again.") from error


def _check_format(found: int, path: str) -> None:
    if found > FORMAT:
        raise UsageError(f"{path} has format {found}, newer than the {FORMAT} of this version: update ltm_pyro.")
    if found < FORMAT:
        raise UsageError(f"{path} has format {found}, and this version reads {FORMAT}; pack the text again.")


def _check_counts(manifest: Manifest) -> None:
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    counts = (manifest.seq_len, manifest.vocabulary, *(x for s in shards for x in (s.size, s.sequences, s.tokens)))
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError("a count is no whole number above 0")
    if not all(split.shards and split == Split.of(split.documents, split.shards) for split in manifest.splits.values()):
        raise ValueError("a split's counts are not its shards'")


def _split(raw: dict[str, Any]) -> Split:
    return Split(**raw | {"shards": tuple(Shard(**shard) for shard in raw["shards"])})
