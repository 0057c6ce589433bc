"""Record in a model's config its training objective and the end tokens of its replies."""

from __future__ import annotations

from dllm_kernels._arguments import integer, kind
from dllm_kernels.models.families import FAMILIES, Family, is_masked_lm, token_ids

ATTENTION_OF = {"mdlm": "bidirectional", "bd3lm": "block_causal"}
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def check_training(objective: object, block_size: object, shift: object) -> None:
    """Raise ValueError or TypeError for an invalid objective, block size or shift."""
    if objective is not None and objective not in ATTENTION_OF:
        raise ValueError(f"objective is {objective!r}; allowed: {', '.join(map(repr, ATTENTION_OF))}, None")
    if block_size is not None:
        integer("block_size", block_size, low=1)
    if shift is not None and not isinstance(shift, bool):
        raise TypeError(f"shift is a {kind(shift)}; it must be True, False or None")


def mark(model, objective: str | None, block_size: int | None, shift: bool | None) -> None:
    """Record in the model's config what it is to be trained for."""
    config = model.config
    entry = dict(config.diffusion)
    before = entry["attention"]
    if objective is not None:
        entry["attention"] = [ATTENTION_OF[objective]]
    elif not before:
        entry["attention"] = [ATTENTION_OF["mdlm"]]
    if block_size is not None:
        entry["block_size"] = block_size
    elif "block_causal" in entry["attention"] and entry.get("block_size") is None:
        entry["block_size"] = 32
    if shift is not None:
        entry["shift"] = shift
    elif not before:
        entry["shift"] = True
    config.diffusion = entry
    for name in _ATTENTION_DROPOUT:  # which masked attention does not have
        if getattr(config, name, 0.0):
            setattr(config, name, 0.0)


def name_end_tokens(model, tokenizer) -> None:
    """List in the config the end tokens of replies: its own and the family's; for masked LMs [SEP]."""
    config = model.config
    ends = list(token_ids(config.eos_token_id))
    if is_masked_lm(model):
        own = (tokenizer.sep_token_id, tokenizer.eos_token_id)
        ends = [end for end in own if end is not None][:1] or ends
    vocabulary = tokenizer.get_vocab()
    named = [vocabulary.get(token) for token in _chat_family(config.model_type).end_tokens]
    ends += [end for end in named if end is not None and end not in ends]
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = config.eos_token_id


def choose_chat_options(model, tokenizer) -> None:
    """Keep the options of the family's chat template that this template reads."""
    template = tokenizer.chat_template or ""
    options = _chat_family(model.config.model_type).chat
    used = {name: value for name, value in options.items() if name in str(template)}
    entry = model.config.diffusion
    model.config.diffusion = {**entry, "chat": {**used, **entry.get("chat", {})}}


def _chat_family(model_type: str) -> Family:
    """Return the row of the converted checkpoints of an architecture, else of the architecture itself."""
    return FAMILIES.get(f"a2d-{model_type}") or FAMILIES.get(model_type) or Family(model_type)
