"""`diffusion_generate` of Dream, a method of its model there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dllm_kernels as dk
from dllm_kernels.compat.canvases import beside_prompt, confidence_of, parity_at_zero, prompt_lengths
from dllm_kernels.models.families import diffusion_of

Hook = Callable[[int | None, Tensor, Tensor | None], Tensor]


@dataclass
class DreamModelOutput:
    """sequences: int64 [B, T]; history: those after every step, or None."""

    sequences: Tensor
    history: tuple[Tensor, ...] | None = None


def diffusion_generate(
    model,
    inputs: Tensor,
    generation_config=None,
    *,
    attention_mask: Tensor | None = None,
    generation_tokens_hook_func: Hook | None = None,
    generation_logits_hook_func: Hook | None = None,
    **kwargs,
) -> DreamModelOutput | Tensor:
    """int64 [B, S + new tokens]: `inputs` [B, S] and their completions.

    generation_config, kwargs: max_new_tokens or max_length (20), steps (512), eps (1e-3), alg ("origin",
    "maskgit_plus", "topk_margin", "entropy" or "confidence_threshold"), alg_temp, temperature (0.0), top_p,
    top_k, threshold, mask_token_id, output_history, return_dict_in_generate; kwargs come first.
    generation_logits_hook_func(step, x, logits [B, T, V]) returns the logits to use, and
    generation_tokens_hook_func(step, x, logits) the tokens to go on with; it is also called before the first
    step, with None for step and logits. Hooks see whole canvases, so prompts must be of one length. Steps
    that commit nothing run no forward and call no hook.
    """
    option = {**_DEFAULTS, **_set_options(generation_config), **kwargs}
    if unknown := option.keys() - _DEFAULTS.keys() - {"mask_token_id"}:
        raise TypeError(f"{min(unknown)!r} is not an option; known: {', '.join(_DEFAULTS)}")
    new_tokens = option["max_new_tokens"] or option["max_length"] - inputs.shape[1]
    temperature = option["temperature"] or 0.0
    common = dict(
        max_new_tokens=new_tokens, block_size=new_tokens, temperature=temperature, top_p=option["top_p"],
        top_k=option["top_k"], mask_id=option.get("mask_token_id"), history=option["output_history"],
        seed=int(torch.randint(2**62, ())) if temperature > 0 else 0,
        **parity_at_zero(temperature, "dream", dict(schedule="dream", cache="none", stop_on_eos=False)),
        **_rule(option),
    )  # fmt: skip
    if generation_logits_hook_func is None and generation_tokens_hook_func is None:
        output = dk.sample(model, inputs, attention_mask=attention_mask, **common)
    else:
        hooks = _Hooks(model, generation_tokens_hook_func, generation_logits_hook_func)
        output = hooks.sample(inputs, attention_mask, common)
    return returned(inputs, attention_mask, output, new_tokens, option["return_dict_in_generate"])


def returned(inputs, attention_mask, output, new_tokens: int, as_object: bool) -> DreamModelOutput | Tensor:
    """What `diffusion_generate` gives back."""
    given = prompt_lengths(inputs, attention_mask)
    sequences = beside_prompt(inputs, given, output.sequences, new_tokens)
    if not as_object:
        return sequences
    history = None
    if output.history is not None:
        history = tuple(beside_prompt(inputs, given, canvas, new_tokens) for canvas in output.history[1:])
    return DreamModelOutput(sequences, history)


_DEFAULTS = dict(
    max_new_tokens=None, max_length=20, steps=512, eps=1e-3, alg="origin", alg_temp=None, temperature=0.0,
    top_p=None, top_k=None, threshold=None, output_history=False, return_dict_in_generate=False,
)  # fmt: skip


def _set_options(config) -> dict:
    """What a generation config says."""
    found = {name: getattr(config, name, None) for name in (*_DEFAULTS, "mask_token_id")}
    return {name: value for name, value in found.items() if value is not None}


def _rule(option: dict) -> dict:
    alg, steps, eps = option["alg"], option["steps"], option["eps"]
    if alg == "origin":
        return dict(rule="bernoulli", steps=steps, eps=eps)
    if alg == "confidence_threshold":
        return dict(threshold=option["threshold"])
    confidence = confidence_of("alg", alg, "maskgit_plus", "topk_margin", "entropy")
    return dict(confidence=confidence, alg_temp=option["alg_temp"] or 0.0, steps=steps, eps=eps)


class _Hooks:
    """Sampling as a function of ids, so that hooks see whole canvases and logits."""

    def __init__(self, model, tokens: Hook | None, logits: Hook | None):
        self.model = model
        self.tokens = tokens or (lambda step, x, logits: x)
        self.change_logits = logits or (lambda step, x, logits: logits)
        self.shift = diffusion_of(model).shift
        self.step, self.logits = 0, None

    def sample(self, inputs: Tensor, attention_mask: Tensor | None, options: dict):
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise ValueError("hooks need prompts of one length, without padding")
        diffusion, new_tokens = diffusion_of(self.model), options.pop("max_new_tokens")
        options["mask_id"] = diffusion.mask_id if options["mask_id"] is None else options["mask_id"]
        masks = inputs.new_full((len(inputs), new_tokens), options["mask_id"])
        canvas = self.tokens(None, torch.cat([inputs, masks], dim=1), None)
        options |= dict(block_size=canvas.shape[1], shift=False, eos_ids=diffusion.eos_ids)
        training = self.model.training
        self.model.eval()
        try:
            with dk.enable_attention(self.model):
                return dk.infill(self.forward, canvas, on_round=self.after, **options)
        finally:
            self.model.train(training)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V], where position i is predicted by row i."""
        logits = self.model(ids, dllm_mask=dk.SpanMask.full(ids.shape[1]), use_cache=False).logits
        if self.shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        self.logits = self.change_logits(self.step, ids, logits)
        return self.logits

    def after(self, event) -> None:
        event.canvas.copy_(self.tokens(self.step, event.canvas, self.logits))
        self.step += 1
