"""The task `topics`: words whose frequencies are all that a sequence has of its own."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement

import numpy as np
from jaxtyping import Float, Int

from ltm_pyro.data.tasks.task import Task, check_options, register_task
from ltm_pyro.errors import UsageError

_MOST = 2**12  # mixtures of topics


@register_task("topics")
@dataclass
class Topics(Task):
    """x_t ~ Σ_k θ_k φ_k, independent given θ: one θ per sequence, φ₁ … φ_K ~ Dirichlet(α) over V words, for all.

    θ is uniform over the proportions of K topics that are multiples of 1/``parts``: with 1 part a sequence has a single
    topic. p(x_t | before) = Σ_θ p(θ | before) (θφ)(x_t), by enumeration of the θ; within a reach of r tokens,
    p(θ | the last r tokens).

    Args:
        topics: K, topics
        words: V, words
        tokens: T, words of a sequence
        alpha: concentration of a topic; the smaller, the more the topics differ
        parts: topics that a sequence is mixed of, in equal parts; the same topic may come twice
        world: random seed of the topics, which other sequences of the same world share
    """

    topics: int = 8
    words: int = 64
    tokens: int = 64
    alpha: float = 1.0
    parts: int = 1
    world: int = 0

    def __post_init__(self) -> None:
        small = {"topics": (self.topics, 1, 10_000), "words": (self.words, 2, 2**14), "tokens": (self.tokens, 1, 2**20)}
        check_options("topics", **small, alpha=(self.alpha, 1e-3, 1e6), parts=(self.parts, 1, 100))
        check_options("topics", world=(self.world, 0, math.inf))
        if (found := math.comb(self.topics + self.parts - 1, self.parts)) > _MOST:
            raise UsageError(f"{self.topics} topics in {self.parts} parts have {found:,} mixtures: lower one of them.")
        self.vocabulary, self.length = self.words, self.tokens

    @cached_property
    def mixtures_MV(self) -> Float[np.ndarray, "M V"]:
        """θφ of every θ: the word frequencies that a sequence may have."""
        rng = np.random.default_rng([self.world, 0x70716373])
        topics_KV = rng.dirichlet(np.full(self.words, self.alpha), self.topics) + 1e-12
        chosen_MP = np.array([*combinations_with_replacement(range(self.topics), self.parts)])
        mixtures_MV = topics_KV[chosen_MP].mean(1)
        return mixtures_MV / mixtures_MV.sum(1, keepdims=True)

    def sample(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, "N T"]:
        """``count`` independent sequences."""
        cumulated_MV = self.mixtures_MV.cumsum(1)
        cumulated_MV /= cumulated_MV[:, -1:]
        which_N, u_NT = rng.integers(0, len(cumulated_MV), count), rng.random((count, self.tokens))
        tokens_NT = np.empty((count, self.tokens), np.int64)
        for m in np.unique(which_N):
            tokens_NT[which_N == m] = np.searchsorted(cumulated_MV[m], u_NT[which_N == m], side="right")
        return tokens_NT

    def nats(self, tokens_NT: Int[np.ndarray, "N T"], reach: int | None = None) -> Float[np.ndarray, "N T"]:
        """−log p(x_t | x_{t−r} … x_{t−1}, t), exactly."""
        logs_VM = np.log(self.mixtures_MV).T
        nats_NT, joint_NM = np.empty(tokens_NT.shape), np.zeros((len(tokens_NT), logs_VM.shape[1]))
        before_N = _log_sum(joint_NM)
        for t in range(self.tokens):
            new_NM = logs_VM[tokens_NT[:, t]]
            if reach == 0:
                nats_NT[:, t] = before_N - _log_sum(new_NM)
                continue
            joint_NM += new_NM
            after_N = _log_sum(joint_NM)
            nats_NT[:, t] = before_N - after_N
            before_N = after_N
            if reach is not None and t >= reach:
                joint_NM -= logs_VM[tokens_NT[:, t - reach]]
                before_N = _log_sum(joint_NM)
        return nats_NT


def _log_sum(x_NM: Float[np.ndarray, "N M"]) -> Float[np.ndarray, " N"]:
    top_N = x_NM.max(1)
    return top_N + np.log(np.exp(x_NM - top_N[:, None]).sum(1))
