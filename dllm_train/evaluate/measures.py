"""Measures reported beside a score: empty answers, answers at the length limit, forwards, errors, seconds."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import MutableMapping
from dataclasses import asdict

from lm_eval.api.model import hash_args

from dllm_train.evaluate.generation import Answer
from dllm_train.evaluate.likelihood import Estimate

_KEY = "dllm answers of "


class Measures:
    """Counts of the answers and estimates of each task.

    truncated: contexts that were cut, by task. seconds, requests: by kind of request.
    """

    def __init__(self):
        self.truncated: Counter = Counter()
        self.seconds: Counter = Counter()
        self.requests: Counter = Counter()
        self._answers: defaultdict[str, dict[str, dict]] = defaultdict(dict)
        self._estimates: defaultdict[str, dict[str, tuple[float, int]]] = defaultdict(dict)
        self._kept: MutableMapping | None = None

    def keep_in(self, kept: MutableMapping) -> None:
        """Keep counts of answers in lm-eval's cache, so that a continued run reports them all."""
        self._kept = kept
        for key, counts in kept.items():
            if key.startswith(_KEY):
                task, _, request = key.removeprefix(_KEY).rpartition(" ")
                self._answers[task][request] = counts

    def add_answer(self, task: str, arguments: tuple, answer: Answer, seconds: float, alone: bool) -> None:
        """Count an answer of a task. seconds: its share of the time; alone: whether all of it was its own."""
        counts = asdict(answer) | dict(text=None, empty=answer.empty, seconds=seconds, alone=alone)
        request = hash_args("generate_until", arguments)
        self._answers[task][request] = counts
        if self._kept is not None:
            self._kept[f"{_KEY}{task} {request}"] = counts

    def add_estimate(self, task: str, arguments: tuple, estimate: Estimate) -> None:
        """Count an estimate of a task; arguments: (context, continuation), or (text,) of a whole text."""
        size = len(arguments[0].encode()) if len(arguments) == 1 else 0
        request = hash_args("loglikelihood", arguments)
        self._estimates[task][request] = estimate.standard_error, size

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}  # for other processes, which have caches of their own

    def add_time(self, kind: str, requests: int, seconds: float) -> None:
        """Count the time of so many different requests of a kind."""
        self.requests[kind] += requests
        self.seconds[kind] += seconds

    @property
    def tasks(self) -> list[str]:
        """Return the tasks with measures."""
        return sorted({*self._answers, *self._estimates})

    def joined(self, others: list[Measures]) -> Measures:
        """Return these measures and those of other processes, which compute at the same time."""
        both = Measures()
        for one in (self, *others):
            both.truncated += one.truncated
            both.requests += one.requests
            for kind, seconds in one.seconds.items():
                both.seconds[kind] = max(both.seconds[kind], seconds)
            for task, answers in one._answers.items():
                both._answers[task] |= answers
            for task, estimates in one._estimates.items():
                both._estimates[task] |= estimates
        return both

    def of(self, task: str) -> dict[str, float]:
        """Return the measures of a task by name.

        empty_answers, at_length_limit: shares. tokens_per_forward, tokens_per_second: of all answers.
        tokens_per_second_alone: the median over requests, where each ran alone. nats_error: the mean standard
        error of the estimates. bits_per_byte_error: the standard error of their sum, per byte.
        truncated_contexts: how many.
        """
        found: dict[str, float] = {}
        if answers := list(self._answers.get(task, {}).values()):
            forwards = sum(answer["forwards"] for answer in answers)
            found["empty_answers"] = sum(answer["empty"] for answer in answers) / len(answers)
            found["at_length_limit"] = sum(answer["at_limit"] for answer in answers) / len(answers)
            tokens = sum(answer["tokens"] for answer in answers)
            found["tokens_per_forward"] = tokens / max(forwards, 1)
            found["tokens_per_second"] = tokens / sum(answer["seconds"] for answer in answers)
            if all(answer["alone"] for answer in answers):
                rates = [answer["tokens"] / answer["seconds"] for answer in answers]
                found["tokens_per_second_alone"] = statistics.median(rates)
        if task in self._estimates:
            errors, sizes = zip(*self._estimates[task].values(), strict=True)
            found["nats_error"] = math.fsum(errors) / len(errors)
            if sum(sizes):
                found["bits_per_byte_error"] = math.hypot(*errors) / math.log(2) / sum(sizes)
        if task in self.truncated:
            found["truncated_contexts"] = self.truncated[task]
        return found
