"""A conversation with a model: its turns, the options of a reply, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_kernels.cli.options import parsed, with_rule
from dllm_kernels.cli.streams import file_bytes, write_file

if TYPE_CHECKING:
    from dllm_kernels.sampling.prefix_cache import PrefixCache

ROLES = ("system", "user", "assistant")
NOT_HERE = ("chat", "history", "max_batch")  # options that say nothing in a conversation


@dataclass
class Conversation:
    """Messages, and what is needed to continue them. Without a chat template they are one text, in which each
    input begins a line and is continued.

    options: of `dk.sample`, as they were given. dropped: messages at the start that the model no longer sees,
    since all of them do not fit its positions. reused: tokens of the last prompt whose keys and values were
    there already.
    """

    model: object
    tokenizer: object
    name: str
    options: dict = field(default_factory=dict)
    preset: str | None = None
    messages: list[dict] = field(default_factory=list)
    dropped: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        from dllm_kernels.models.families import diffusion_of

        self.diffusion = diffusion_of(self.model)
        self._cache: PrefixCache | None = None
        self.check(self.options)

    @property
    def templated(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    @property
    def exchanges(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def check(self, options: dict) -> None:
        """Raise ValueError or TypeError for options that this model cannot be sampled with."""
        from dllm_kernels.sampling.plan import make_plan

        for name in NOT_HERE:
            if name in options:
                raise ValueError(f"{name} has no meaning in a conversation")
        given = with_rule(options, self.preset)
        make_plan(self.model, self.tokenizer, given.pop("config", None), given)

    def set(self, assignment: str) -> None:
        """Set an option as in "threshold 0.8" or "threshold=0.8"; none takes it back. What cannot be is
        refused, and nothing changes."""
        name, _, value = assignment.replace("=", " ", 1).strip().partition(" ")
        name = name.removeprefix("--").replace("-", "_")
        if not value.strip():
            raise ValueError(f"give {name or 'an option'} a value, such as /set threshold 0.8")
        options = {**self.options, name: parsed(name, value)}
        if value.strip().lower() == "none":
            del options[name]
        self.check(options)
        self.options = options

    def ask(self, text: str) -> None:
        """Add what the user says."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add what the model says."""
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> dict | None:
        """Take back the last input and its reply; return the input, None if there is none."""
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at]["role"] == "user":
                asked = self.messages[at]
                del self.messages[at:]
                return asked
        return None

    def forget_unanswered(self) -> None:
        """Take back an input that has no reply."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def sample(self, prepared=lambda ids: None):
        """Return the SampleOutput of a reply to the last message. prepared: called with the ids of the prompt
        before the first forward; returns what is called after every round."""
        from dllm_kernels.sampling.api import sample

        options = with_rule(self.options, self.preset)
        ids, new, size = self._fitting(options)
        cache = self._cache_for(len(ids) + new + size, options)
        before = 0 if cache is None else cache.reused_tokens
        try:
            return sample(
                self.model, [ids], tokenizer=self.tokenizer, on_round=prepared(ids), prefix_cache=cache,
                **options,
            )  # fmt: skip
        finally:
            self.reused = 0 if cache is None else cache.reused_tokens - before

    def _cache_for(self, tokens: int, options: dict) -> PrefixCache | None:
        """Return the conversation's cache, with room for so many tokens; None where nothing can be kept."""
        from dllm_kernels.sampling.plan import make_plan
        from dllm_kernels.sampling.prefix_cache import PrefixCache

        given = dict(options)
        plan = make_plan(self.model, self.tokenizer, given.pop("config", None), given)
        if not PrefixCache.serves(plan):
            return None
        if self._cache is None or self._cache.tokens < tokens:
            self._cache = PrefixCache(tokens=2 * tokens)
        return self._cache

    def _fitting(self, options: dict) -> tuple[list[int], int, int]:
        """Return the ids of the messages, the oldest ones dropped where the model has no room for all, the
        number of new tokens, and that of a block's."""
        from dllm_kernels.sampling.config import SampleConfig

        config = options.get("config") or SampleConfig()
        new = options.get("max_new_tokens", config.max_new_tokens)
        size = options.get("block_size", self.diffusion.block_size or config.block_size)
        limit = self.diffusion.max_positions
        system = [message for message in self.messages if message["role"] == "system"]
        others = [message for message in self.messages if message["role"] != "system"]
        self.dropped = 0
        while True:
            ids = self._ids([*system, *others[self.dropped :]])
            following = next(
                (at for at in range(self.dropped + 1, len(others)) if others[at]["role"] == "user"), None
            )
            if limit is None or len(ids) + new + size <= limit or following is None:
                return ids, new, size
            self.dropped = following

    def _ids(self, messages: list[dict]) -> list[int]:
        from dllm_kernels.models.chat import chat_ids
        from dllm_kernels.models.text import text_ids

        if self.templated:
            (ids,) = chat_ids([messages], self.tokenizer, self.diffusion.chat)
            return ids
        return text_ids("the text", self.text(messages), self.tokenizer)

    @staticmethod
    def text(messages: list[dict]) -> str:
        """Return messages as one text, for a model without a chat template."""
        text = ""
        for message in messages:
            if message["role"] != "assistant" and text and not text.endswith("\n"):
                text += "\n"
            text += message["content"]
        return text

    # ---- the file ----------------------------------------------------------------------------------------
    def save(self, file: Path) -> None:
        """Write the name of the model and the messages as JSON, as a whole or not at all."""
        fields = {"model": self.name, "messages": self.messages}
        write_file(file, (json.dumps(fields, ensure_ascii=False, indent=2) + "\n").encode())

    def load(self, file: Path) -> None:
        """Go on with the messages of a file; ValueError for one that `save` did not write."""
        try:
            entries = json.loads(file_bytes(file))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        messages = entries.get("messages") if isinstance(entries, dict) else None
        if not isinstance(messages, list):
            raise ValueError(f'{file} is no conversation: it must hold {{"messages": [...]}}')
        for number, message in enumerate(messages):
            fits = isinstance(message, dict) and message.get("role") in ROLES
            if not fits or not isinstance(message.get("content"), str):
                raise ValueError(
                    f'{file}: messages[{number}] must be {{"role": {" | ".join(ROLES)}, "content": "..."}}'
                )
        self.messages = [{"role": one["role"], "content": one["content"]} for one in messages]
