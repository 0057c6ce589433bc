"""Texts of requests to token ids: leading tokens, borders, chat templates."""

from __future__ import annotations

import hashlib
import json

from dllm_kernels.models.families import Diffusion
from dllm_kernels.models.text import encode


class Texts:
    """The reading of requests by a checkpoint's tokenizer.

    name: of the checkpoint, for errors. add_bos_token: whether texts begin with BOS; None: as the tokenizer
    does. prefix: the token that is the context of texts without one; None: BOS, [CLS] or the end token.
    leading: tokens that every text begins with. Nothing follows a text, since its answer goes there.
    """

    def __init__(
        self, name: str, tokenizer, diffusion: Diffusion, add_bos_token: bool | None, prefix: int | None
    ):
        self.name, self.tokenizer, self.diffusion = name, tokenizer, diffusion
        self.leading = _leading_tokens(tokenizer, add_bos_token)
        ends = (*diffusion.eos_ids, tokenizer.eos_token_id)
        found = (prefix, tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None), *ends)
        self.prefix: int | None = next((token for token in found if token is not None), None)
        self._chosen: str | None = None

    def encode(self, text: str, leading: bool = True) -> list[int]:
        """Return the ids of a text, behind the leading tokens unless it has them already."""
        ids = encode("the text", text, self.tokenizer, special_tokens=False)
        first = self.leading if leading else []
        return ids if ids[: len(first)] == first else [*first, *ids]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of both, cut out of those of the whole text.

        Blanks at the end of the context belong to the continuation, as in lm-eval, and so does a token that
        spans the border. Without a context the prefix is the context.
        """
        prefix = [] if self.prefix is None else [self.prefix]
        if not context:
            target = self.encode(continuation, leading=False)
            shared = len(target) > 1 and target[:1] == prefix
            return (target[:1], target[1:]) if shared else (prefix, target)
        spoken = context.rstrip()
        if spoken:
            context, continuation = spoken, context[len(spoken) :] + continuation
        given, whole = self.encode(context), self.encode(context + continuation)
        same = next(
            (place for place, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b),
            min(len(given), len(whole)),
        )
        same = min(same, len(whole) - 1)
        return whole[:same], whole[same:]

    # ---- chat templates --------------------------------------------------------------------------------
    @property
    def template(self) -> str:
        """Return the chat template in use; ValueError if there is none."""
        template = self._chosen or self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            raise ValueError(f"{self.name} has no chat template; leave out --apply_chat_template")
        return template

    def choose(self, template: str | None) -> None:
        """Apply this template from now on, in place of the tokenizer's own."""
        self._chosen = template

    def conversation(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Return a conversation as text, up to where the reply begins, or goes on from the last message.

        If the template takes no system message, its text is put before the first message.
        """
        from jinja2 import TemplateError

        options = dict(
            self.diffusion.chat, tokenize=False, chat_template=self.template,
            add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        conversations, (first, *others) = [messages], messages
        if first["role"] == "system" and others:
            merged = {**others[0], "content": f"{first['content']}\n\n{others[0]['content']}"}
            conversations.append([merged, *others[1:]])
        for conversation in conversations:
            try:
                return self.tokenizer.apply_chat_template(conversation, **options)
            except TemplateError as error:
                reason = error
        raise ValueError(f"the chat template does not take the messages: {reason}")

    # ---- hashes for records and caches -----------------------------------------------------------------
    @property
    def template_sha256(self) -> str | None:
        """Return the hash of the chat template, or of all by name; None without one."""
        template = self._chosen or self.tokenizer.chat_template
        return None if template is None else _sha256(json.dumps(template, sort_keys=True))

    @property
    def tokenizer_sha256(self) -> str:
        """Return the hash of a tokenizer of the tokenizers library; of others, that of the vocabulary."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return _sha256(vocabulary if backend is None else backend.to_str())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _leading_tokens(tokenizer, add_bos_token: bool | None) -> list[int]:
    if add_bos_token is False:
        return []
    if add_bos_token:
        if tokenizer.bos_token_id is None:
            raise ValueError("add_bos_token is true, and the tokenizer has no BOS token")
        return [tokenizer.bos_token_id]
    inner = encode("a text", "a", tokenizer, special_tokens=False)
    whole = encode("a text", "a", tokenizer)
    for start in range(len(whole) - len(inner), -1, -1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start]
    return []
