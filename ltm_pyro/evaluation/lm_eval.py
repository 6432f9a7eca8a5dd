"""A run as a model of the lm-evaluation-harness, and the harness's command line with this model registered.

python -m ltm_pyro.evaluation.lm_eval run --model ltm_pyro --model_args run=runs/kinds --tasks … --include_path …
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows

from ltm_pyro.data.encode import encode_prompt
from ltm_pyro.data.tokenizer import END_OF_TEXT
from ltm_pyro.errors import UsageError
from ltm_pyro.runs.load import load_run
from ltm_pyro.text.generation import generate_from_tokens
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.scoring import Scoring, score_rows, score_tokens

NAME = "ltm_pyro"
BATCH = 32  # texts, where the harness is asked to find out by itself
MAX_GEN_TOKS = 256  # as in its model for Hugging Face
FILTERS = ("top_k", "top_p", "min_p")
TOP_K = 50  # where a task samples and says nothing: the default of Hugging Face's `generate`
WITHOUT_EFFECT = {"num_beams": 1, "early_stopping": False}  # settings that say what is done anyway
_log = logging.getLogger(__name__)


class LTM(TemplateLM):
    """A run as a model of the harness; its log-likelihoods are estimates, and the results name the estimator.

    Requests are handled as by the harness's model for Hugging Face: a context is encoded together with its
    continuation, what is too long loses the beginning of its context, and a continuation that is longer than the model
    is refused. The z of a continuation is inferred from its context only. ``loglikelihood_rolling`` infers a z for
    every T tokens, and like that model does not score an end of text, which the harness's measures do not count.

    Args:
        run: run directory, checkpoint or exported model.
        estimator: a name from `ESTIMATORS`.
        samples: S, draws per text after the fit.
        batch_size: texts per batch; 32 for ``auto``.
        max_batch_size: of ``auto``.
        device: where the model is put; as in the harness's own models, the CPU where there is no CUDA device.
        seed: random seed.
        workers: processes on a CPU that share the batches of log-likelihoods.
        trust: lets the run's recipe name code of others, as in `load_run`.
    """

    def __init__(
        self,
        run: str,
        estimator: str = "iwae",
        samples: int = 16,
        batch_size: int | str = BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        workers: int = 1,
        trust: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = [name for name in signature(type(self)).parameters if name != "unknown"]
            near = get_close_matches(next(iter(unknown)), known, 1)
            raise UsageError(
                f"--model_args has no {next(iter(unknown))}{f'; did you mean {near[0]}' if near else ''}: choose from "
                f"{', '.join(known)}."
            )
        if str(batch_size).startswith("auto"):
            batch_size = min(BATCH, int(max_batch_size or BATCH))
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("There is no CUDA device for %s: %s is put on the CPU.", device, run)  # cuda:0 is its default
            device = "cpu"
        self._run, self._path = load_run(run, device or "cpu", trust=trust is True), run
        counts = {"samples": samples, "batch_size": batch_size, "seed": seed, "workers": workers}
        asked: dict[str, Any] = {name: int(x) for name, x in counts.items()}  # which are strings on the command line
        self._scoring = Scoring(estimator=estimator, **asked)

    def get_model_info(self) -> dict[str, Any]:
        """The entries of the results that describe the figures."""
        scoring = self._scoring
        return {
            "ltm_pyro_run": self._path,
            "ltm_pyro_estimator": scoring.estimator,
            "ltm_pyro_samples": scoring.samples,
        }

    @property
    def tokenizer_name(self) -> str:
        """The run's path, the key of the harness's cache."""
        return self._path

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also starts every sequence."""
        return self._run.start_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """The tokens of a context or a continuation, none of them special."""
        return encode_prompt(self._run.tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        length, pairs = self._run.length, []
        for asked, context, tokens in requests:
            if len(tokens) > length:
                raise UsageError(
                    f"The continuation {asked[1][:40]!r} has {len(tokens)} tokens, but the model's length is {length}: "
                    f"leave the task out, or give a longer model."
                )
            # the harness's prefix, which the decoder puts before every sequence anyway
            context = context[1:] if context[:1] == [self.prefix_token_id] else context
            if (over := len(context) + len(tokens) - length) > 0:
                _log.warning(
                    "A context loses its first %d of %d tokens: the model's length is %d.", over, len(context), length
                )
            pairs.append((context[max(0, over) :], tokens))
        answers = [(-found.nats, found.is_greedy) for found in score_tokens(self._run, pairs, self._scoring)]
        for (asked, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """−nats of whole texts by the estimator, each row of the harness's windows with thoughts of its own.

        A later row follows the start token, and not the token before it as in the harness's other models.
        """
        windows = [
            (index, tokens)
            for index, request in enumerate(requests)
            for _, tokens in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._run.length,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)  # of a blank text, too
        nats = score_rows(self._run, [tokens for _, tokens in windows], self._scoring)
        for (index, _), row_nats in zip(windows, nats, strict=True):
            totals[index] -= row_nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, which is removed; greedy unless the task asks for sampling."""
        length, scoring = self._run.length, self._scoring
        plans = [self._plan(request.args[1]) for request in requests]  # refuses before anything is generated
        room_of = {id(request.args[1]): plan for request, plan in zip(requests, plans, strict=True)}
        order = Collator([request.args for request in requests], lambda args: 0, lambda args: args[1], "gen_kwargs")
        texts: list[str] = []
        for group in order.get_batched(n=0):  # all of a group, so that equal prompts have different texts
            sampling, stops = room_of[id(group[0][1])]
            rows = [self.tok_encode(context)[-(length - sampling.max_new_tokens) :] for context, _ in group]
            written = generate_from_tokens(self._run, rows, sampling, seed=scoring.seed, batch_size=scoring.batch_size)
            for (context, asked), text in zip(group, written, strict=True):
                texts.append(postprocess_generated_text(text, stops, None))
                self.cache_hook.add_partial("generate_until", (context, asked), texts[-1])
        return order.get_original(texts)

    def _plan(self, asked: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
        """How a request is written, and its stop strings; `UsageError` for settings that it would not follow."""
        said = {name: value for name, value in asked.items() if value is not None}
        given, length = dict(normalize_gen_kwargs(said, MAX_GEN_TOKS)), self._run.length
        given = {name: x for name, x in given.items() if name not in WITHOUT_EFFECT or x != WITHOUT_EFFECT[name]}
        stops = handle_stop_sequences(given.pop("until"), eos=END_OF_TEXT)
        room = given.pop("max_gen_toks")
        if room >= length:
            _log.warning("%d tokens are asked for, but the model's length is %d: half of it is written.", room, length)
            room = max(1, length // 2)
        temperature = float(given.pop("temperature", 0.0))
        is_greedy = not given.pop("do_sample") or temperature == 0
        filters = {name: given.pop(name, None) for name in FILTERS}
        if "top_k" not in asked:
            filters["top_k"] = TOP_K
        penalty = given.pop("repetition_penalty", None)
        if given:
            known = ("until", "max_gen_toks", "do_sample", "temperature", *FILTERS, "repetition_penalty")
            raise UsageError(
                f"The task asks for generation with {next(iter(given))}, which this model does not know: choose from "
                f"{', '.join(known)}."
            )
        chosen: dict[str, Any] = {} if is_greedy else filters | {"temperature": temperature}
        sampling = Sampling(
            max_new_tokens=1 if "" in stops else room,  # an empty stop string is there after the first token
            do_sample=not is_greedy,
            stop_strings=[stop for stop in stops if stop],
            repetition_penalty=1.0 if penalty is None else penalty,
            **chosen,
        )
        return sampling, stops


def main() -> None:
    """The harness's own command line, with `ltm_pyro` as one of its models."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if NAME not in model_registry:
    model_registry.register(NAME, target=LTM)

if __name__ == "__main__":
    main()
