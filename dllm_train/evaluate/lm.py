"""DiffusionLM: the lm-eval model `dllm`."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property

from lm_eval.api.model import CacheHook, TemplateLM

import dllm_kernels as dk
from dllm_kernels.models.checkpoint import load_tokenizer
from dllm_kernels.models.families import diffusion_of
from dllm_train.evaluate.generation import GAP, Answer, Prompt, StopTokens, fill, generate
from dllm_train.evaluate.likelihood import Estimate, log_likelihoods, rolling_log_likelihood
from dllm_train.evaluate.measures import Measures
from dllm_train.evaluate.modes import is_instruct, seeing_both_sides
from dllm_train.evaluate.options import GenerationOptions, generation_options, model_options
from dllm_train.evaluate.pace import waves
from dllm_train.evaluate.processes import Processes
from dllm_train.evaluate.record import checkpoint_hash
from dllm_train.evaluate.texts import Texts

log = logging.getLogger("lm_eval.dllm")

ROWS = 32  # in flight for batch_size=auto
_FIRST = 8  # requests whose time predicts that of all
_LEAST = 64  # likelihoods that share forwards
_ROLLING_SAMPLES = 8  # of a whole document, whose many tokens average the noise


class DiffusionLM(TemplateLM):
    """A diffusion language model for lm-eval's tasks.

    pretrained: a name that `dk.load` takes, or a loaded model, with its tokenizer as `tokenizer`.
    device: None takes the GPU if there is one; under accelerate each process has its own.
    batch_size: rows in flight, or "auto". It changes no answer. max_batch_size: the most for "auto".
    max_length: the most positions of a request, context and answer; None is the model's own limit. A longer
        request raises ValueError before anything runs, unless `truncate`, which cuts contexts on the left.
    add_bos_token: whether texts begin with the BOS token; None does as the tokenizer. A text that has it gets
        no second one. prefix_token_id: the context of texts without one; None is BOS, or else the end token.
    instruct: whether this is an instruct checkpoint; None tells by its name and chat template.
    options: dtype, attention, base and merge_projections of `dk.load`; every option of `dk.SampleConfig` but
        chat, history and max_batch; estimator, samples, batch_tokens and check_greedy of `log_likelihoods`,
        and its parity as likelihood_parity. Generation kwargs of a task win over those of sampling.

    Base checkpoints are scored by the bound of their training objective. Instruct checkpoints are scored by
    the order in which their sampler would write the answer (estimator="confidence").
    """

    def __init__(
        self,
        pretrained=None,
        *,
        tokenizer=None,
        device=None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        instruct: bool | None = None,
        truncate: bool = False,
        **options,
    ):
        super().__init__()
        if pretrained is None:
            raise ValueError("pretrained is missing; give a folder, a hub name or tiny-python")
        self.options = model_options(options)
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.processes = Processes(device)
        self._rank, self._world_size = self.processes.rank, self.processes.world_size
        if isinstance(pretrained, str):
            self.name = pretrained
            self.model, own = dk.load(pretrained, device=self.processes.device, **self.options.loading)
            tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer or own
        else:
            if self.options.loading:
                raise ValueError(
                    f"{min(self.options.loading)} is for loading, and pretrained is a loaded model"
                )
            self.name, self.model = getattr(pretrained, "name_or_path", "") or "model", pretrained
        if tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer; give tokenizer=, a folder that has one")
        self.tokenizer, self._device = tokenizer, self.model.device
        self.diffusion = diffusion_of(self.model)
        self._max_length = _max_length(max_length, self.diffusion.max_positions)
        self.truncate = _flag("truncate", truncate)
        self.texts = Texts(
            self.name, tokenizer, self.diffusion, _flag("add_bos_token", add_bos_token), prefix_token_id
        )
        self.stop_tokens = StopTokens(tokenizer)
        self.config = self._config({})
        self.instruct, reason = (
            is_instruct(self.name, tokenizer)
            if instruct is None
            else (_flag("instruct", instruct), "as given")
        )
        self.estimation = {"estimator": "confidence"} if self.instruct else {}
        self.estimation |= self.options.estimation
        log_likelihoods(self.model, [], **self.estimation)  # reports mistakes in them before anything runs
        self.measures = Measures()
        self._of_others: list[Measures] = []
        self._warned: set[tuple] = set()
        if self.rank == 0:
            log.info(self._mode(reason))

    # ---- what lm-eval asks of a model ------------------------------------------------------------------
    @property
    def eot_token_id(self) -> int:
        """Return the end token."""
        ends = self.diffusion.eos_ids or (self.tokenizer.eos_token_id,)
        return ends[0]

    @property
    def prefix_token_id(self) -> int | None:
        """Return the context of texts without one; None if the tokenizer has no token for it."""
        return self.texts.prefix

    @property
    def max_length(self) -> int | None:
        """Return the most positions of a request; None: any number."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Return the length of answers if a task gives none."""
        return generation_options({}, self.options.sampling).new_tokens

    @property
    def tokenizer_name(self) -> str:
        """Name the tokenizer and its chat template, for lm-eval's cache of requests."""
        return f"{self.name.replace('/', '__')}-{self.texts.template_sha256}"

    def all_gather(self, tensor):
        """Return the tensors of all processes, one after the other."""
        return self.processes.all_gather(tensor)

    def gather_object(self, obj, dst: int = 0):
        """Return the objects of all processes in process `dst`."""
        return self.processes.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all processes, and collect their measures."""
        gathered = self.gather_object(self.measures)
        if gathered is not None:
            self._of_others = gathered[1:]
        self.processes.barrier()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Return the ids of a text, behind the tokens that a text begins with unless it has them.

        add_special_tokens: False leaves them out.
        """
        return self.texts.encode(string, add_special_tokens is not False)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, up to where the reply begins or continues."""
        return self.texts.conversation(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that `--apply_chat_template` names, which is the one applied from now on."""
        if not chat_template:
            return None
        self.texts.choose(super().chat_template(chat_template))
        return self.texts.template

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Keep answers through `--use_cache`; raise ValueError for a file with those of another model."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is None:
            return
        ours, found = self.fingerprint(), cache_hook.dbdict.get("dllm")
        if found is None and len(cache_hook.dbdict) == 0:
            cache_hook.dbdict["dllm"] = ours
        elif found != ours:
            raise ValueError(
                f"{cache_hook.dbdict.filename} holds answers of another model or of other options; give "
                "--use_cache another path, or delete it"
            )
        self.measures.keep_in(cache_hook.dbdict)

    def get_model_info(self) -> dict:
        """Return the description of the model in the results."""
        measures = self.measures.joined(self._of_others)
        return {
            "model_num_parameters": sum(weight.numel() for weight in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_sha": self.checkpoint_sha256,
            "dllm": {
                "checkpoint": {
                    "name": self.name, "sha256": self.checkpoint_sha256, "dtype": str(self.model.dtype),
                    "attention": self.diffusion.attention, "device": str(self.device),
                },
                "tokenizer": {"sha256": self.texts.tokenizer_sha256},
                "chat_template": {"sha256": self.texts.template_sha256},
                "sampling": asdict(self.config),
                "estimation": self.estimation,
                "processes": self.world_size,
                "seconds": dict(measures.seconds),
                "requests": dict(measures.requests),
                "measures": {task: measures.of(task) for task in measures.tasks},
            },
        }  # fmt: skip

    # ---- requests --------------------------------------------------------------------------------------
    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, is_greedy) of each (context, continuation)."""
        pairs = [self._pair(request) for request in requests]
        alone = Counter((request.task_name, request.doc_id) for request in requests)
        greedy = self.estimation.get("check_greedy")
        asked = [
            alone[request.task_name, request.doc_id] == (request.repeats or 1) if greedy is None else greedy
            for request in requests
        ]
        found: dict[tuple, Estimate] = {}
        for check in (False, True):
            these = [index for index, one in enumerate(asked) if one is check]

            def keep(index: int, estimate: Estimate, check: bool = check) -> None:
                found[pairs[index], check] = estimate
                answer = _scored(estimate)
                self.cache_hook.add_partial("loglikelihood", requests[index].args, answer)

            self._estimate(
                "loglikelihood", [pairs[index] for index in these], keep, these,
                lambda wave, check=check, **more: log_likelihoods(
                    self.model, wave, **self.estimation | dict(check_greedy=check) | more
                ),
            )  # fmt: skip
        estimates = [found[pair, check] for pair, check in zip(pairs, asked, strict=True)]
        for request, estimate in zip(requests, estimates, strict=True):
            self.measures.add_estimate(request.task_name, request.args, estimate)
        return [_scored(estimate) for estimate in estimates]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text, in windows where it is too long for one."""
        documents = [tuple(self.tok_encode(request.args[0], False)) for request in requests]
        for request, document in zip(requests, documents, strict=True):
            if not document:
                raise ValueError(f"{_named(request)}: the text is empty, so nothing can be scored")
        options = {"samples": _ROLLING_SAMPLES} | self.estimation
        options.pop("check_greedy", None)
        if options.get("estimator") == "confidence" and "estimator" not in self.options.estimation:
            options["estimator"] = "auto"  # the confidence order is for short answers
        context = [] if self.prefix_token_id is None else [self.prefix_token_id]
        found: dict[tuple, Estimate] = {}

        def keep(index: int, estimate: Estimate) -> None:
            found[((), documents[index])] = estimate
            self.cache_hook.add_partial(
                "loglikelihood_rolling", requests[index].args, estimate.log_likelihood
            )

        self._estimate(
            "loglikelihood_rolling", [((), document) for document in documents], keep, range(len(documents)),
            lambda wave, **more: rolling_log_likelihood(
                self.model, [document for _, document in wave], context=context, window=self.max_length,
                **options | more,
            ),
        )  # fmt: skip
        estimates = [found[(), document] for document in documents]
        for request, estimate in zip(requests, estimates, strict=True):
            self.measures.add_estimate(request.task_name, request.args, estimate)
        return [estimate.log_likelihood for estimate in estimates]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each (context, generation kwargs), up to its first stop string."""
        groups: dict[tuple, list[int]] = {}
        wanted = [self._wanted(request) for request in requests]
        for index, (_, options) in enumerate(wanted):
            groups.setdefault((options.infill, options.until, options.sampling), []).append(index)
        configs = [self._config(dict(sampling)) for _, _, sampling in groups]
        answers: dict[int, Answer] = {}
        for ((infill, until, _), indices), config in zip(groups.items(), configs, strict=True):
            self._answer(requests, wanted, indices, infill, until, config, answers)
        return [answers[index].text for index in range(len(requests))]

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(target)) for _, context, target in requests]
        return [_scored(estimate) for estimate in log_likelihoods(self.model, pairs, **self.estimation)]

    # ---- likelihood ------------------------------------------------------------------------------------
    def _pair(self, request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of a context and of its continuation, which fit the model together."""
        context, continuation = request.args
        if not continuation:
            raise ValueError(f"{_named(request)}: the continuation is empty, so nothing can be scored")
        given, target = self.texts.pair(context, continuation)
        if not target:
            raise ValueError(f"{_named(request)}: the continuation {continuation!r} has no tokens of its own")
        given = self._fitting(request, given, len(target), "the continuation")
        return tuple(given), tuple(target)

    def _estimate(self, what: str, pairs: Sequence, keep: Callable, indices: Sequence[int], run: Callable):
        """Call `run` with the different pairs, those of one context together, the longest contexts first, and
        `keep` with each one's estimate."""
        first = {pair: index for pair, index in reversed(list(zip(pairs, indices, strict=True)))}
        order = sorted(first, key=lambda pair: (-len(pair[0]), pair[0], -len(pair[1]), pair[1]))
        costs = [len(context) + len(target) for context, target in order]
        begin = time.monotonic()
        for wave in waves(what, order, costs, first=_FIRST, least=_LEAST, quiet=self.rank > 0):
            more = {"request_ids": [_number(*pair) for pair in wave]}
            if self.batch_size != "auto" and "batch_tokens" not in self.estimation:
                more["batch_tokens"] = self.batch_size * max(len(c) + len(t) for c, t in wave)
            for pair, estimate in zip(wave, run(wave, **more), strict=True):
                keep(first[pair], estimate)
        self.measures.add_time(what, len(order), time.monotonic() - begin)

    # ---- generation ------------------------------------------------------------------------------------
    def _wanted(self, request) -> tuple[Sequence[int] | str, GenerationOptions]:
        """Return the start of a request's answer, ids or a text with a gap, and how to generate it."""
        context, kwargs = request.args
        options = generation_options(kwargs, self.options.sampling)
        if options.infill:
            gaps = GAP.findall(context)
            if len(gaps) != 1:
                raise ValueError(f"{_named(request)}: infill takes a text with one gap, written <mask:24>")
            masks = int(gaps[0].strip("<mask:>"))
            given = len(self.tok_encode(GAP.sub("", context)))
            if self.max_length is not None and given + masks > self.max_length:
                raise ValueError(
                    f"{_named(request)}: the context has {given} tokens and its gap {masks}, more than the "
                    f"{self.max_length} positions of {self.name}"
                )
            return context, options
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self._warn_of_overruled(request.task_name, options)
        size = dict(options.sampling).get("block_size", self.config.block_size)
        size = size if self.diffusion.attention == "block_causal" else 1
        return self._fitting(request, ids, options.new_tokens, "max_gen_toks", size), options

    def _answer(self, requests, wanted, indices, infill, until, config, answers: dict[int, Answer]) -> None:
        """Answer requests of one kind, the longest first, and keep what is finished."""
        seen: Counter = Counter()
        prompts: dict[tuple, list[int]] = {}
        for index in indices:
            given, options = wanted[index]
            key = (given if infill else tuple(given), options.new_tokens)
            seen[key] += config.temperature > 0  # every repeat draws again
            prompts.setdefault((*key, seen[key]), []).append(index)
        order = sorted(prompts, key=lambda key: (-len(key[0]) - key[1], key))
        costs = [len(key[0]) / 8 + key[1] for key in order]
        rows = ROWS if self.batch_size == "auto" else self.batch_size
        begin, quiet = time.monotonic(), self.rank > 0
        alone = {"most": 1} if rows == 1 else {}  # so that each has its own time
        for wave in waves(
            "generate_until", order, costs, first=min(rows, _FIRST), least=2 * rows, quiet=quiet, **alone
        ):
            numbers, start = [_number(*key) for key in wave], time.monotonic()
            if infill:
                with seeing_both_sides(self.model, self.options.loading.get("attention")):
                    texts = [key[0] for key in wave]
                    found = fill(
                        self.model, self.tokenizer, texts, numbers, until=until, max_batch=rows, config=config
                    )
            else:
                given = [Prompt(key[0], key[1], number) for key, number in zip(wave, numbers, strict=True)]
                found = generate(
                    self.model, self.tokenizer, given, until=until, stop_tokens=self.stop_tokens,
                    max_batch=rows, config=config,
                )  # fmt: skip
            share = (time.monotonic() - start) / sum(answer.forwards for answer in found)
            for key, answer in zip(wave, found, strict=True):
                seconds = share * answer.forwards
                for index in prompts[key]:
                    task, arguments = requests[index].task_name, requests[index].args
                    answers[index] = answer
                    self.measures.add_answer(task, arguments, answer, seconds, len(wave) == 1)
                    self.cache_hook.add_partial("generate_until", arguments, answer.text)
        self.measures.add_time("generate_until", len(order), time.monotonic() - begin)

    # ---- what requests share ---------------------------------------------------------------------------
    def _fitting(self, request, ids: list[int], more: int, what: str, size: int = 1) -> list[int]:
        """Return `ids`, which must fit the model with `more` tokens behind them, rounded up to blocks."""
        if self.max_length is None:
            return ids
        room = self.max_length // size * size - more
        if len(ids) <= room:
            return ids
        if not self.truncate or room < 1:
            raise ValueError(
                f"{_named(request)}: the context has {len(ids)} tokens and {what} {more}, more than the "
                f"{self.max_length} positions of {self.name}; give fewer shots, a smaller max_gen_toks, or "
                "truncate=true, which cuts contexts on the left"
            )
        self.measures.truncated[request.task_name] += 1
        leading = self.texts.leading if ids[: len(self.texts.leading)] == self.texts.leading else []
        return [*leading, *ids[-(room - len(leading)) :]] if room > len(leading) else ids[-room:]

    def _warn_of_overruled(self, task: str, options: GenerationOptions) -> None:
        """Say once for each task which options of model_args its own generation_kwargs overrule."""
        wins = {"max_new_tokens": options.new_tokens, **dict(options.sampling)}
        for name, value in self.options.sampling.items():
            if wins.get(name, value) != value and (task, name) not in self._warned and self.rank == 0:
                self._warned.add((task, name))
                log.warning(
                    "task %s sets %s=%s, so %s of model_args does not apply to it; --gen_kwargs does",
                    task, name, wins[name], value,
                )  # fmt: skip

    def _config(self, sampling: Mapping[str, object]) -> dk.SampleConfig:
        """Return the options of sampling of a request, whose own win over those of the model."""
        own = {"block_size": self.diffusion.block_size} if self.diffusion.block_size else {}
        given = {**own, **self.options.sampling, **sampling}
        return dk.SampleConfig(**given)

    def _mode(self, reason: str) -> str:
        """Say how requests are answered, and why."""
        kind = "an instruct checkpoint" if self.instruct else "a base checkpoint"
        said = self.estimation.get("estimator", "auto")
        way = "prompts belong in its chat template" if self.instruct else "prompts stay as they are"
        return f"{self.name} is {kind} ({reason}): {way}, likelihoods by estimator={said}"

    @cached_property
    def checkpoint_sha256(self) -> str:
        """Return the hash of the weights."""
        return checkpoint_hash(self.name, self.model)

    def fingerprint(self) -> str:
        """Return a hash of all that an answer depends on besides its request."""
        facts = dict(
            weights=self.checkpoint_sha256, tokenizer=self.texts.tokenizer_sha256,
            leading=self.texts.leading, prefix=self.texts.prefix, dtype=str(self.model.dtype),
            attention=self.diffusion.attention, sampling=asdict(self.config),
            estimation={name: value for name, value in self.estimation.items() if name != "batch_tokens"},
            max_length=self.max_length, truncate=self.truncate,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _scored(estimate: Estimate) -> tuple[float, bool]:
    return estimate.log_likelihood, bool(estimate.is_greedy)


def _number(*key) -> int:
    """Return a number of 31 bits for a request, the same in every process and run."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


def _named(request) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _batch_size(given: int | str, most: int | None) -> int | str:
    if isinstance(given, str) and given.split(":")[0] == "auto":
        return "auto" if most is None else min(ROWS, int(most))
    try:
        size = int(given)
    except (TypeError, ValueError):
        size = 0
    if size < 1 or isinstance(given, bool):
        raise ValueError(f"batch_size is {given!r}; it must be an integer >= 1 or auto")
    return size


def _max_length(given: int | None, limit: int | None) -> int | None:
    if given is None:
        return limit
    if isinstance(given, bool) or not isinstance(given, int) or given < 2:
        raise ValueError(f"max_length is {given!r}; it must be an integer >= 2")
    if limit is not None and given > limit:
        raise ValueError(f"max_length is {given}; the model has {limit} positions")
    return given


def _flag(name: str, given: bool | None) -> bool | None:
    if given is not None and not isinstance(given, bool):
        raise ValueError(f"{name} is {given!r}; it must be true or false")
    return given
