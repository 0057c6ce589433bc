"""The settings that systems publish, one row each."""

PRESETS = {
    # generate.py's defaults
    "llada": dict(max_new_tokens=128, block_size=128, steps=128, cache="none"),
    # the evaluation that its speeds are quoted from: GSM8K, 256 tokens
    "fast_dllm": dict(max_new_tokens=256, block_size=32, threshold=0.9, cache="dual"),
    # the instruct model's example
    "dream": dict(
        max_new_tokens=512, block_size=512, steps=512, schedule="dream", temperature=0.2, top_p=0.95,
        confidence="entropy", cache="none",
    ),
    # dLLM's BD3LM sampler, its defaults
    "bd3lm": dict(max_new_tokens=128, block_size=32, steps=128, cache="block", schedule="dllm"),
    # the model card's example
    "llada2": dict(
        max_new_tokens=512, block_size=32, steps_per_block=32, rule="quota_or_threshold", threshold=0.95,
        cache="block",
    ),
}  # fmt: skip
