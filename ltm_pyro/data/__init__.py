"""Text in, batches out: documents, tokenizer, packed shards and the datasets read from them."""

from ltm_pyro.data.dataset import PackedDataset, load_text_or_pack, pack_texts
from ltm_pyro.data.manifest import Manifest, read_manifest
from ltm_pyro.data.pack import pack
from ltm_pyro.data.sequences import pack_sequences
from ltm_pyro.data.tokenizer import END_OF_TEXT, end_of_text, load_tokenizer

__all__ = [
    "END_OF_TEXT",
    "Manifest",
    "PackedDataset",
    "end_of_text",
    "load_text_or_pack",
    "load_tokenizer",
    "pack",
    "pack_sequences",
    "pack_texts",
    "read_manifest",
]
