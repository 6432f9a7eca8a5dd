"""Where MAUVE's features come from: hidden states of a run of ours, or of a Hugging Face model in a local folder.

Shapes: N texts, F features, B rows, T tokens, D width.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.data.encode import batch_of_rows, encode_document
from ltm_pyro.errors import UsageError
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.text.thoughts import draw_thoughts, infer_rows
from ltm_pyro.utils.extras import extra

CONFIG = "config.json"  # by which Hugging Face's folders are known
AT_ONCE = 32  # texts

Extractor = Callable[[Sequence[str], int], Float[np.ndarray, "N F"]]  # of texts and a seed


@cache
def extractor(place: str) -> Extractor:
    """Texts and a seed to the last layer's state behind every text's last token; long texts are cut."""
    return hugging_face(place) if (Path(place) / CONFIG).is_file() else of_run(load_run(place))


def of_run(run: Run, batch_size: int = AT_ONCE) -> Extractor:
    """The state from which `END_OF_TEXT` is predicted, under one z ~ q(z | x) of the text as a document."""

    def features(texts: Sequence[str], seed: int) -> Float[np.ndarray, "N F"]:
        rows = [encode_document(run.tokenizer, text)[: run.length] for text in texts]
        found = []
        for first in range(0, len(rows), batch_size):
            batch = batch_of_rows(rows[first : first + batch_size], run.start_token, run.length, run.device)
            with torch.no_grad():
                batch = run.model.prepare(batch)
                keys = [(seed, first + row) for row in range(batch.size)]
                z_BLKD = draw_thoughts(run, batch, infer_rows(run, batch, run.inference, keys), keys=keys).z_BLKD
                hidden_BTD: Tensor = run.model.decoder(batch.stem_BTD, z_BLKD)
            found.append(hidden_BTD[torch.arange(batch.size), batch.tokens_B - 1])
        return torch.cat(found).double().cpu().numpy()

    return features


def hugging_face(folder: str) -> Extractor:
    """A causal model's tokenizer and safetensors weights from a folder; nothing is fetched, and no code of its is run.

    Raises `UsageError` where the folder cannot be read so.
    """
    transformers = extra("transformers", "suites", "A Hugging Face model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except Exception as error:  # the library raises whatever the missing file's reader raises
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{folder} is no Hugging Face model with tokenizer and safetensors ({reason}).") from None

    cut = {"truncation": True, "max_length": model.config.max_position_embeddings, "return_tensors": "pt"}

    def features(texts: Sequence[str], seed: int) -> Float[np.ndarray, "N F"]:
        with torch.no_grad():
            states = [model(**tokenizer(text, **cut)).last_hidden_state[0, -1] for text in texts]
        return torch.stack(states).double().cpu().numpy()

    return features
