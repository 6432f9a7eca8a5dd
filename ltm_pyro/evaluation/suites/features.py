"""Features of texts for MAUVE: hidden states of a run, or of a Hugging Face model in a local folder.

Shapes: N texts, F features, B rows, T tokens, D width.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.data.encode import batch_of_rows, batches_of_like_length, encode_document
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.row_noise import RowKeys
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.text.thoughts import draw_thoughts
from ltm_pyro.utils.extras import extra

CONFIG = "config.json"  # a folder with this file is a Hugging Face model
BATCH = 32  # texts

Extractor = Callable[[Sequence[str], int], Float[np.ndarray, "N F"]]  # (texts, seed) -> features


@cache
def load_extractor(place: str, trust: bool = False) -> Extractor:
    """A function from texts to the last layer's hidden state at each text's last token; long texts are cut.

    Args:
        place: a folder with a Hugging Face model, or a run.
        trust: of the run, as in `load_run`.
    """
    is_hugging_face = (Path(place) / CONFIG).is_file()
    return hugging_face_extractor(place) if is_hugging_face else run_extractor(load_run(place, trust=trust))


def run_extractor(run: Run, batch_size: int = BATCH) -> Extractor:
    """The state from which `END_OF_TEXT` is predicted, under one z ~ q(z | x) of the text as a document.

    A text that comes again, as those do that several sets are compared with, is not fitted again.
    """
    known: dict[tuple[int, tuple[int, ...]], Tensor] = {}  # seed and tokens -> (F,)

    def features(texts: Sequence[str], seed: int) -> Float[np.ndarray, "N F"]:
        rows = [tuple(encode_document(run.tokenizer, text)[: run.length]) for text in texts]
        new = [row for row in dict.fromkeys(rows) if (seed, row) not in known]
        for chosen in batches_of_like_length([*map(len, new)], batch_size, run.length):
            some = [new[index] for index in chosen]
            batch = batch_of_rows(some, run.start_token, run.length, run.device)
            with torch.no_grad():
                batch = run.model.prepare(batch)
                keys = RowKeys.of_batch(batch, seed)
                state, _ = infer_local(run.model, run.guide, batch, run.inference, keys=keys)
                z_BLKD = draw_thoughts(run, batch, state, keys=keys).z_BLKD
                hidden_BTD = run.model.decoder(cast(Tensor, batch.stem_BTD), z_BLKD)
            last_BD = hidden_BTD[torch.arange(batch.size), batch.tokens_B - 1].double().cpu()
            known.update(zip(((seed, row) for row in some), last_BD, strict=True))
        return torch.stack([known[seed, row] for row in rows]).numpy()

    return features


def hugging_face_extractor(folder: str) -> Extractor:
    """Hidden states of a causal model whose tokenizer and safetensors weights are in a folder.

    Nothing is downloaded and no code from the folder is run. Raises `UsageError` if the folder cannot be read that way.
    """
    transformers = extra("transformers", "suites", "A Hugging Face model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except Exception as error:  # the exception depends on which file is missing
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{folder} is no Hugging Face model with tokenizer and safetensors ({reason}).") from None

    cut = {"truncation": True, "max_length": model.config.max_position_embeddings, "return_tensors": "pt"}

    def features(texts: Sequence[str], seed: int) -> Float[np.ndarray, "N F"]:
        with torch.no_grad():
            states = [model(**tokenizer(text, **cut)).last_hidden_state[0, -1] for text in texts]
        return torch.stack(states).double().cpu().numpy()

    return features
