"""Conversations to token ids, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dllm_kernels.models.text import check_text, check_token_count


def chat_ids(
    prompts, tokenizer, options: Mapping[str, object] | None = None, limit: int | None = None
) -> list[list[int]]:
    """Return one list of ids per conversation, up to where the reply begins.

    prompts: text or a list of texts, each a user's first message; or a conversation, which is a list of
    messages {"role": ..., "content": ...}; or a list of conversations. A reply that ends one is continued.
    options: what the family's template is given (`Diffusion.chat`). limit: the model's positions; a message
    that is longer raises ValueError before the template is filled in.
    """
    if tokenizer is None:
        raise ValueError("chat=True needs tokenizer=, which holds the chat template")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat=True, but the tokenizer has no chat template; set tokenizer.chat_template")
    conversations = _conversations(prompts)
    for index, conversation in enumerate(conversations):
        for text in _texts(conversation):
            check_text(f"prompts[{index}]", text)
            check_token_count(f"prompts[{index}]", text, tokenizer, limit)
    return [
        _ids(index, conversation, tokenizer, options or {})
        for index, conversation in enumerate(conversations)
    ]


def _texts(messages) -> Iterator[str]:
    """Yield every str in the values of messages, at any depth."""
    if isinstance(messages, str):
        yield messages
    elif isinstance(messages, Mapping | Sequence) and not isinstance(messages, bytes):
        for value in messages.values() if isinstance(messages, Mapping) else messages:
            yield from _texts(value)


def _conversations(prompts) -> list[list[Mapping]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise TypeError(
            f"prompts is {prompts!r}; with chat=True give a str, a list of str, a list of messages, or a "
            "list of such lists"
        )
    if all(isinstance(message, Mapping) for message in prompts):
        prompts = [prompts]
    conversations = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts
    ]
    for index, conversation in enumerate(conversations):
        if not isinstance(conversation, Sequence) or not conversation:
            raise TypeError(f"prompts[{index}] is {conversation!r}; give text or a list of messages")
        for message in conversation:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise TypeError(
                    f'prompts[{index}] holds {message!r}; a message is {{"role": "user", "content": "..."}}'
                )
    return conversations


def _ids(index: int, conversation: list[Mapping], tokenizer, options: Mapping[str, object]) -> list[int]:
    from jinja2 import TemplateError

    continued = conversation[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            conversation,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            tokenize=True,
            return_dict=False,
            **options,
        )
    except TemplateError as error:
        raise ValueError(f"prompts[{index}] does not fit the chat template: {error}") from error
