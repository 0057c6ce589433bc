"""The chat template of a converted model."""

from __future__ import annotations

from dllm_kernels._arguments import kind
from dllm_kernels.models.families import is_masked_lm

# A turn is "Role: text" and an end token; encoders have no tokens for roles. The reply, end token included,
# stands in a generation block, by which transformers marks what a trainer counts.
_PLAIN = (
    "{{ BEGIN }}{% for message in messages %}{{ message['role'] | capitalize + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + END }}{% endgeneration %}"
    "{% else %}{{ message['content'] + END }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def chat_template_of(model, tokenizer, given: str | None) -> str | None:
    """Return the given template, else the tokenizer's own, else a default one for masked LMs."""
    if given is not None:
        _check(given)
        return given
    if tokenizer.chat_template is not None or not is_masked_lm(model):
        return tokenizer.chat_template
    end = tokenizer.sep_token or tokenizer.eos_token
    if end is None:
        raise ValueError(
            "the tokenizer has neither a [SEP] nor an eos token to end a message; give chat_template="
        )
    begin = tokenizer.cls_token or tokenizer.bos_token or ""
    return _PLAIN.replace("BEGIN", repr(begin)).replace("END", repr(end))


def _check(template: object) -> None:
    """Refuse a value that is no Jinja template, or that cannot render two messages."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not isinstance(template, str):
        raise TypeError(f"chat_template is a {kind(template)}; it must be a str")
    messages = [{"role": "user", "content": "5f1c"}, {"role": "assistant", "content": "9d2e"}]
    try:
        filled, _ = render_jinja_template(conversations=[messages], chat_template=template)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"chat_template cannot be filled in: {error}") from None
    if "5f1c" not in filled[0] or "9d2e" not in filled[0]:
        raise ValueError("chat_template leaves out what the messages say; give a Jinja template, not a name")
