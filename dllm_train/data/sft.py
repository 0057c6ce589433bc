"""Examples for supervised fine-tuning: prompts are given, replies are trained."""

import logging
from collections import Counter
from contextlib import contextmanager

from datasets import DatasetDict, Features, IterableDataset, IterableDatasetDict, Value

from dllm_train.data.chat import Span, encode_conversation, labels_in, tokenize_spans
from dllm_train.data.pretraining import TOKENS
from dllm_train.data.sources import (
    AnyDataset,
    check_not_empty,
    fields_of,
    load_dataset_spec,
    map_numbered,
)
from dllm_train.data.text import check_length, check_tokens, end_token, first_token, text_of
from dllm_train.noise import IGNORED_LABEL

logger = logging.getLogger(__name__)

CONVERSATIONS = ("messages", "conversations")
PAIRS = (  # prompt, reply, what stands between them in plain text
    ("prompt", "response", ""),
    ("prompt", "completion", ""),
    ("instruction", "output", "\n\n"),
    ("instruction", "response", "\n\n"),
    ("question", "answer", "\n\n"),
)
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool",
}  # fmt: skip


def load_sft_dataset(
    dataset: str,
    tokenizer,
    *,
    max_length: int,
    truncation: str = "right",
    chat: str = "auto",
    train_on: str = "all",
    insert_bos: bool = False,
    insert_eos: bool = True,
    block_size: int | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    num_proc: int | None = None,
    seed: int = 0,
) -> DatasetDict | IterableDatasetDict:
    """Return examples with `input_ids`, `labels` (-100 outside the replies) and `length`.

    dataset: see `load_dataset_spec`, also for `streaming`, `shuffle_buffer` and `seed`. Rows have one of:
      `messages` or `conversations`, lists of {role, content} or {from, value}; prompt + response or
      completion, texts or lists of messages; instruction (+ input) + output or response; question + answer.
    chat: "template" renders the tokenizer's chat template; "plain" puts the prompt before the reply as they
      are (instructions and questions with an empty line between); "auto": "template" if the tokenizer has
      one.
    train_on: "all" replies of a conversation | the "last" one. Messages after the last reply are left out.
    truncation: "right" keeps the first max_length tokens | "filter" leaves longer examples out | "error"
      raises ValueError. Examples without a trained token are left out. A warning counts what is left out.
    insert_bos: begin with the BOS token, unless the template already does. insert_eos: end with the end
      token, trained, unless the template already ends with a special token.
    block_size: max_length must be a multiple of it. num_proc: processes that tokenize; they change no
      example.
    Raises ValueError that names the dataset, the row and the field.
    """
    encode = EncodeExamples(
        tokenizer,
        max_length=check_length(max_length, block_size),
        truncation=truncation,
        chat=chat,
        train_on=train_on,
        insert_bos=insert_bos,
        insert_eos=insert_eos,
    )

    def prepare(rows: AnyDataset, name: str) -> AnyDataset:
        return encode.apply(rows, name, num_proc=num_proc)

    examples = load_dataset_spec(
        dataset, streaming=streaming, shuffle_buffer=shuffle_buffer, seed=seed, prepare=prepare
    )
    for split, part in examples.items():
        examples[split] = _keep_trained(part)
        check_not_empty(examples[split], f"{dataset!r}, {split}, without the rows left out,")
    return examples


def warn_left_out(reasons: Counter, rows: int) -> None:
    """Log how many of the rows are left out, for each reason."""
    for reason, count in reasons.items():
        logger.warning("left out %d of %d rows: %s", count, rows, reason)


class EncodeExamples:
    """Tokenize a row and set its labels; a class, so that datasets can hash it and send it to processes."""

    features = Features(
        {"input_ids": TOKENS, "labels": TOKENS, "length": Value("int32"), "left_out": Value("string")}
    )

    def __init__(
        self,
        tokenizer,
        *,
        max_length: int,
        truncation: str = "right",
        chat: str = "auto",
        train_on: str = "all",
        insert_bos: bool = False,
        insert_eos: bool = True,
    ):
        _check_choice("truncation", truncation, ("right", "filter", "error"))
        _check_choice("chat", chat, ("auto", "template", "plain"))
        _check_choice("train_on", train_on, ("all", "last"))
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if chat == "template" and not has_template:
            raise ValueError("chat is 'template', but the tokenizer has no chat template")
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.plain = chat == "plain" or not has_template
        self.train_on = train_on
        self.bos_id = first_token(tokenizer) if insert_bos else None
        self.eos_id = end_token(tokenizer) if insert_eos else None
        self.special_ids = frozenset(tokenizer.all_special_ids)

    def apply(self, rows: AnyDataset, name: str, **options) -> AnyDataset:
        """Return an example for each row; `left_out` says why one is not to be used, or is empty.

        name: of the dataset, for errors. options: of `map_numbered`.
        """
        fields = fields_of(rows)
        if not any(field in fields for field in CONVERSATIONS) and not _pair_of(fields):
            expected = [*CONVERSATIONS, *(f"{prompt} + {reply}" for prompt, reply, _ in PAIRS)]
            raise ValueError(f"{name} has the fields {fields}; expected one of: {', '.join(expected)}")
        return map_numbered(rows, self, name, features=self.features, remove_columns=fields, **options)

    def __call__(self, row: dict, index: int, name: str) -> dict:
        ids, labels = self._encode(row, index, name)
        left_out = ""
        if len(ids) > self.max_length:
            if self.truncation == "error":
                raise ValueError(
                    f"row {index} of {name} has {len(ids)} tokens, more than max_length, {self.max_length}"
                )
            if self.truncation == "filter":
                left_out = f"longer than max_length, {self.max_length}, in {name}"
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if not left_out and all(label == IGNORED_LABEL for label in labels):
            left_out = f"no reply within max_length, {self.max_length}, in {name}"
        return {"input_ids": ids, "labels": labels, "length": len(ids), "left_out": left_out}

    def _encode(self, row: dict, index: int, name: str) -> tuple[list[int], list[int]]:
        if self.plain:
            text, replies = _plain_text(row, index, name)
            with _errors_name_row(index, name):
                ids, spans = tokenize_spans(self.tokenizer, text, replies)
            labels = labels_in(ids, spans)
        else:
            messages, tools = _messages(row, index, name), row.get("tools") or None
            if not any(message["role"] == "assistant" for message in messages):
                return [], []
            with _errors_name_row(index, name):
                ids, labels = encode_conversation(
                    self.tokenizer, messages, train_on=self.train_on, tools=tools
                )
        check_tokens(self.tokenizer, ids, index, name)
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids, labels = [self.bos_id, *ids], [IGNORED_LABEL, *labels]
        if self.eos_id is not None and not (ids and ids[-1] in self.special_ids):
            ids, labels = [*ids, self.eos_id], [*labels, self.eos_id]
        return ids, labels


@contextmanager
def _errors_name_row(index: int, name: str):
    try:
        yield
    except ValueError as error:
        raise ValueError(f"row {index} of {name}: {error}") from error


def _pair_of(fields) -> tuple[str, str, str] | None:
    return next((pair for pair in PAIRS if pair[0] in fields and pair[1] in fields), None)


def _messages(row: dict, index: int, name: str) -> list[dict]:
    """Return the conversation of a row as {"role", "content", ...}, in the roles of chat templates."""
    field = next((field for field in CONVERSATIONS if field in row), None)
    if field:
        return _checked(row[field], field, index, name)
    prompt, reply, _ = _pair_of(row)
    if isinstance(row[prompt], list):
        replies = row[reply]
        if not isinstance(replies, list):
            replies = [{"role": "assistant", "content": replies}]
        return _checked([*row[prompt], *replies], f"{prompt} + {reply}", index, name)
    return [
        {"role": "user", "content": _prompt_text(row, prompt, index, name)},
        {"role": "assistant", "content": text_of(row[reply], reply, index, name)},
    ]


def _checked(messages: object, field: str, index: int, name: str) -> list[dict]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"row {index} of {name}: {field!r} is not a list of messages")
    checked = []
    for place, message in enumerate(messages):
        role = message.get("role") or message.get("from")
        if role not in ROLES:
            raise ValueError(
                f"row {index} of {name}: message {place} of {field!r} has the role {role!r}; expected one of "
                f"{', '.join(ROLES)}"
            )
        content = message.get("content") if "content" in message else message.get("value")
        if content is None and message.get("tool_calls"):
            content = ""
        rest = {
            key: value
            for key, value in message.items()
            if value is not None and key not in ("role", "from", "content", "value")
        }
        place_name = f"{field}[{place}].content"
        checked.append({"role": ROLES[role], "content": text_of(content, place_name, index, name), **rest})
    return checked


def _plain_text(row: dict, index: int, name: str) -> tuple[str, list[Span]]:
    """Return prompt and reply as one text, and where the reply is."""
    pair = _pair_of(row)
    if pair is None or isinstance(row[pair[0]], list):
        raise ValueError(
            f"row {index} of {name} is a conversation, which needs a chat template, and "
            "the tokenizer has none, or chat is 'plain'"
        )
    prompt, reply, between = pair
    before = _prompt_text(row, prompt, index, name) + between
    text = before + text_of(row[reply], reply, index, name)
    return text, [Span(len(before), len(text))] if len(text) > len(before) else []


def _prompt_text(row: dict, prompt: str, index: int, name: str) -> str:
    text = text_of(row[prompt], prompt, index, name)
    if prompt == "instruction" and row.get("input"):
        text += "\n\n" + text_of(row["input"], "input", index, name)
    return text


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def _keep_trained(examples: AnyDataset) -> AnyDataset:
    """Leave out the examples whose `left_out` says why, with a warning that counts them."""
    if isinstance(examples, IterableDataset):
        return examples.filter(_Kept()).remove_columns("left_out")
    reasons = Counter(reason for reason in examples["left_out"] if reason)
    warn_left_out(reasons, len(examples))
    if reasons:
        examples = examples.filter(_is_empty, input_columns="left_out")
    return examples.remove_columns("left_out")


def _is_empty(reason: str) -> bool:
    return not reason


class _Kept:
    """Filter a stream by `left_out`; warn at the 1st, 2nd, 4th, 8th … row left out for a reason."""

    def __init__(self):
        self.counts: Counter = Counter()

    def __call__(self, row: dict) -> bool:
        reason = row["left_out"]
        if reason:
            self.counts[reason] += 1
            if self.counts[reason].bit_count() == 1:
                logger.warning("left out %d rows so far: %s", self.counts[reason], reason)
        return not reason
