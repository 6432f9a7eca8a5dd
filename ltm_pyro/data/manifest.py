"""What a packed folder says about itself: `manifest.json`, against which every shard is checked when it is read."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltm_pyro.contracts import UsageError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file: its SHA-256, and how many sequences, tokens and UTF-8 bytes of text it holds."""

    file: str
    sha256: str
    sequences: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """One side of the corpus; tokens count one `END_OF_TEXT` for each document and no padding, bytes are of UTF-8."""

    documents: int
    sequences: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A pack: ``seq_len`` tokens a sequence, over a vocabulary of V tokens, by split (``"train"``, ``"val"``)."""

    format: int
    tokenizer_hash: str
    vocabulary: int
    seq_len: int
    splits: dict[str, Split]

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return asdict(self)


def is_pack(directory: str | Path) -> bool:
    """Whether ``directory`` has a manifest, and so is a pack."""
    return (Path(directory) / MANIFEST).is_file()


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Writes `manifest.json` into ``directory``."""
    (directory / MANIFEST).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n", "utf-8")


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of the pack ``directory``; raises `UsageError` if there is none or it cannot be understood."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise UsageError(f"{directory} is not a packed corpus (no {MANIFEST}); make one with `ltm data pack`.")
    try:
        raw = json.loads(path.read_text("utf-8"))
        splits = {name: _split(split) for name, split in raw.pop("splits").items()}
        manifest = Manifest(**raw, splits=splits)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{path} cannot be read as a manifest ({error!r}); pack the text again.") from error
    if manifest.format != FORMAT:
        raise UsageError(f"{path} has format {manifest.format}, and this version reads {FORMAT}; pack the text again.")
    return manifest


def _split(raw: dict[str, Any]) -> Split:
    return Split(**raw | {"shards": tuple(Shard(**shard) for shard in raw["shards"])})
