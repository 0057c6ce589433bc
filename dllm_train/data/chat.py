"""Conversations as token ids, with labels on the assistant's replies alone."""

import re
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from dllm_train.noise import IGNORED_LABEL

PLACEHOLDER = "PLACEHOLDER7f3aOFdc52A9REPLY"
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Span(NamedTuple):
    """Half-open range of characters or tokens."""

    start: int
    end: int


def encode_conversation(
    tokenizer, messages: list[dict], *, train_on: str = "all", tools: list | None = None
) -> tuple[list[int], list[int]]:
    """Return ids and labels of a conversation up to its last reply.

    messages: {"role", "content"}, at least one of them by "assistant". train_on: "all" replies | the "last".
    A reply and the token that ends it have labels; headers, prompts and what follows a reply have -100.
    Raises ValueError for templates in which the place of a reply cannot be told.
    """
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    text, replies = render_replies(tokenizer, messages[: last + 1], train_on=train_on, tools=tools)
    ids, spans = tokenize_spans(tokenizer, text, replies)
    return ids, labels_in(ids, spans)


def render_replies(
    tokenizer, messages: list[dict], *, train_on: str = "all", tools: list | None = None
) -> tuple[str, list[Span]]:
    """Return the text of a conversation that ends with a reply, and the spans of its replies in characters.

    The template's own {% generation %} blocks are used if it has them, with the token after them. Otherwise
    a reply is the text that the template adds to the conversation before it, which must be a prefix of the
    whole.
    """
    template = tokenizer.get_chat_template(tools=tools)

    def render(part: list[dict], **options) -> str:
        return tokenizer.apply_chat_template(part, tools=tools, tokenize=False, **options) if part else ""

    try:
        if GENERATION_BLOCK.search(template):
            text, replies = _render_blocks(tokenizer, template, messages, tools)
        else:
            text = render(messages).rstrip()
            places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            places = places[-1:] if train_on == "last" else places
            replies = [_find_reply(render, text, messages, i, tokenizer.eos_token) for i in places]
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    replies = replies[-1:] if train_on == "last" else replies
    return text, [reply for reply in replies if reply.start < reply.end]


def tokenize_spans(tokenizer, text: str, spans: list[Span]) -> tuple[list[int], list[Span]]:
    """Return the ids of `text`, and the spans of characters as spans of tokens.

    No token crosses a border of a span. If one would, the text is tokenized piece by piece, as in sampling,
    where the prompt is tokenized without the reply.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    borders = sorted({0, len(text)}.union(*spans))
    whole, *pieces = encode([text, *(text[start:end] for start, end in pairwise(borders))])
    ids = list(chain.from_iterable(pieces))
    places = dict(zip(borders, accumulate(map(len, pieces), initial=0), strict=True))
    if ids != whole:
        # Pieces that get an extra space, as in SentencePiece, have other tokens than the whole text.
        prefixes = encode([text[:border] for border in borders[1:-1]])
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            ids = whole
            places = dict(zip(borders, [0, *map(len, prefixes), len(whole)], strict=True))
        elif tokenizer.decode(ids) != tokenizer.decode(whole):
            raise ValueError(
                "a token lies on both sides of the border of a reply, and the tokenizer reads the text in "
                "pieces differently; change the template so that a special token or a line break stands "
                "before replies"
            )
    return ids, [Span(places[span.start], places[span.end]) for span in spans]


def labels_in(ids: list[int], spans: list[Span]) -> list[int]:
    """Return labels that are the ids within `spans` and -100 elsewhere."""
    labels = [IGNORED_LABEL] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def _render_blocks(tokenizer, template: str, messages: list[dict], tools) -> tuple[str, list[Span]]:
    """Return the text and its {% generation %} blocks, each with the token that ends a reply.

    That token, such as <|im_end|>, is the text after the last block. If it were given, the model would see
    where a reply ends before it writes it.
    """
    texts, blocks = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    text = texts[0].rstrip()
    after = text[blocks[0][-1][1] :] if blocks[0] else ""
    ends = [end + len(after) if text.startswith(after, end) else end for _, end in blocks[0]]
    return text, [Span(start, min(end, len(text))) for (start, _), end in zip(blocks[0], ends, strict=True)]


def _find_reply(render, text: str, messages: list[dict], place: int, end_token: str | None) -> Span:
    """Return where the reply messages[place] lies in `text`, the rendered conversation."""
    before = render(messages[:place], add_generation_prompt=False)
    prompt = render(messages[:place], add_generation_prompt=True)
    until = render(messages[: place + 1]).rstrip()
    if end_token and not text.startswith(until):  # some templates end every conversation with it, as Phi 3
        until = until.removesuffix(end_token).rstrip()
        before = before.removesuffix(end_token)
    if not until.startswith(prompt) or not text.startswith(until):
        changed = "prompt before" if text.startswith(until) else "text up to"
        raise ValueError(
            f"the chat template is not prefix-stable: the {changed} message {place}, a reply, changes "
            "once more messages follow; give the tokenizer a template with {% generation %} blocks, or train "
            "on the last reply only"
        )
    if prompt != before:
        return Span(len(prompt), len(until))
    # Without a generation prompt, the header of a reply comes with it: see where another content would begin.
    other = render([*messages[:place], {**messages[place], "content": PLACEHOLDER}])
    header = other[len(before) :].partition(PLACEHOLDER)[0] if PLACEHOLDER in other else until
    if not until.startswith(before + header):
        raise ValueError(
            f"the chat template changes the content of message {place}, so that its place cannot be told; "
            "give the tokenizer a template with {% generation %} blocks"
        )
    return Span(len(before) + (len(header) if header.strip() else 0), len(until))
