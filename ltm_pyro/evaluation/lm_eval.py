"""A run as a model of the lm-evaluation-harness, and the harness's command line with this model registered.

python -m ltm_pyro.evaluation.lm_eval run --model ltm_pyro --model_args run=runs/quickstart --tasks … --include_path …
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry

from ltm_pyro.data.encode import encode_prompt
from ltm_pyro.runs.load import load_run
from ltm_pyro.text.generation import decode, generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.scoring import Scoring, score, score_tokens

NAME = "ltm_pyro"
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class LTM(TemplateLM):
    """A run as a model of the harness; its log-likelihoods are estimates, and the results name the estimator.

    The z of a continuation is inferred from its context only. If context and continuation together exceed the model's
    length, the beginning of the context is dropped. ``loglikelihood_rolling`` infers a z for every T tokens.

    Args:
        run: run directory, checkpoint or exported model.
        estimator: a name from `ESTIMATORS`.
        samples: S, draws per text after the fit.
        batch_size: texts per batch.
        seed: random seed.
        trust: lets the run's recipe name code of others, as in `load_run`.
    """

    def __init__(
        self,
        run: str,
        estimator: str = "iwae",
        samples: int = 16,
        batch_size: int | str = 32,
        seed: int = 0,
        trust: bool = False,
        **ignored: Any,  # the harness passes device and the like
    ) -> None:
        super().__init__()
        self._run, self._path = load_run(run, trust=trust is True), run
        self._scoring = Scoring(estimator=estimator, samples=int(samples), batch_size=int(batch_size), seed=int(seed))

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
        pairs = []
        for _, context, tokens in requests:
            tokens = tokens[-self._run.length :]
            # the decoder starts every sequence with this token anyway
            context = [token for token in context if token != self.eot_token_id]
            pairs.append((context[max(0, len(context) + len(tokens) - self._run.length) :], tokens))
        return [(-found.nats, found.is_greedy) for found in score_tokens(self._run, pairs, self._scoring)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """−nats of whole texts by the estimator, `END_OF_TEXT` included.

        Each text is a document, as in training: the harness divides by the words or bytes of the text, so its
        perplexities are a little higher than those of models whose end of text is not scored.
        """
        return [-found.nats for found in score(self._run, [request.args[0] for request in requests], self._scoring)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, which is removed; greedy unless the task asks for sampling."""
        texts: list[str] = []
        tokenizer = self._run.tokenizer
        for asked, group in groupby((request.args for request in requests), lambda args: args[1]):
            stops = asked.get("until") or []
            stops = tuple([stops] if isinstance(stops, str) else stops)
            given = {name: asked[name] for name in SAMPLING if asked.get("do_sample") and name in asked}
            room = min(int(asked.get("max_gen_toks", 256)), self._run.length // 2)
            sampling = Sampling(max_new_tokens=room, stop_strings=stops, **{"do_sample": False} | given)
            kept = [encode_prompt(tokenizer, prompt)[-(self._run.length - room) :] for prompt, _ in group]
            prompts, scoring = decode(self._run, kept), self._scoring
            written = generate(self._run, prompts, sampling, seed=scoring.seed, batch_size=scoring.batch_size)
            texts += [
                text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))] for text in written
            ]
        return texts


def main() -> None:
    """The harness's own command line, with `ltm_pyro` as one of its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if NAME not in model_registry:
    model_registry.register(NAME, target=LTM)

if __name__ == "__main__":
    main()
