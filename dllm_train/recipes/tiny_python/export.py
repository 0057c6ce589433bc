"""Write tiny-python as a stock transformers checkpoint with its tokenizer, and its model card."""

from pathlib import Path

import dllm_kernels as dk

ATTENTION = ("block_causal", "bidirectional")
USAGE = """```python
import dllm_kernels as dk

model, tokenizer = dk.load("tiny-python")
print(dk.sample(model, "def read_lines(path):", tokenizer=tokenizer, threshold=0.9).texts[0])
```"""


def export(model, tokenizer, folder: Path, block_size: int) -> None:
    """Write float16 weights, config.json with "diffusion", tokenizer; other files of `folder` stay."""
    model = model.half()
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.diffusion = {
        "block_size": block_size,
        "attention": list(ATTENTION),
        "objectives": ["bd3lm", "mdlm"],
        "shift": False,
    }
    dk.save(model, tokenizer, folder)


def model_card(evaluation: dict) -> str:
    """Return README.md of the checkpoint; every figure is taken from `evaluation` (evaluation.json)."""
    model, corpus, training = evaluation["model"], evaluation["corpus"], evaluation["training"]
    bound, additions, infill = evaluation["bound"], evaluation["additions"], evaluation["infill"]
    completion = evaluation["completion"]
    environment = evaluation["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    paragraphs = [
        "# tiny-python",
        f"A diffusion language model of {model['parameters'] / 1e6:.2f}M parameters for Python source: a "
        f"Qwen3 architecture ({model['layers']} layers, width {model['hidden']}, vocabulary "
        f"{model['vocabulary']}), trained from scratch by `python -m dllm_train.recipes.tiny_python`. One "
        f"checkpoint serves two kinds of attention: `block_causal` (blocks of {model['block_size']}, for "
        "completion, with an exact block cache) and `bidirectional` (for infilling). It is small enough to "
        "ship with the library and shows what the decoding methods do; it is not a useful programmer.",
        USAGE,
        "## Training",
        f"- Data: {corpus['train_documents']} files ({corpus['train_bytes'] / 1e6:.1f} MB) of the standard "
        f"library of Python {corpus['python']}, without tests and generated tables; "
        f"{corpus['held_out_documents']} files ({corpus['held_out_bytes'] / 1e3:.0f} kB) are held out by a "
        "hash of their path. Besides, generated additions `assert 37 + 85 == 122`; "
        f"{corpus['held_out_pairs']} ordered pairs of two-digit operands are held out.\n"
        "- Objectives: an autoregressive phase, then MDLM and BD3LM in turn, besides batches of additions.\n"
        f"- {_runs(training)}, on {environment['cores']} CPU cores shared with other work.",
        "## Measured",
        "On held-out data, through `dk.load`, `dk.sample` and `dk.infill`, float32, temperature 0.",
        table(
            ("what", "attention", "value"),
            (
                (
                    f"bound on bits per byte (BD3LM, blocks of {model['block_size']})",
                    "block_causal",
                    f"{bound['bd3lm_bits_per_byte']:.3f} ± {bound['bd3lm_standard_error']:.3f}",
                ),
                (
                    f"bound on bits per byte (MDLM, rows of {bound['row_length']})",
                    "bidirectional",
                    f"{bound['mdlm_bits_per_byte']:.3f} ± {bound['mdlm_standard_error']:.3f}",
                ),
                ("`gzip -9` on the same bytes", "–", f"{bound['gzip_bits_per_byte']:.3f}"),
                (
                    f"additions of {additions['pairs']} held-out pairs exact, one token per step",
                    "block_causal",
                    percent(additions["one_per_step"]["exact"]),
                ),
                *(
                    (
                        "completed lines that repeat the line before, " + words,
                        "block_causal",
                        percent(completion[rule]["repeated_lines"]),
                    )
                    for rule, words in (("one_per_step", "one token per step"), ("0.9", "threshold 0.9"))
                ),
                (
                    "lines of held-out code that repeat the line before",
                    "–",
                    percent(completion["held_out_repeated_lines"]),
                ),
                *(
                    (
                        f"infilled lines exact ({infill['lines']} lines), one token per step",
                        kind,
                        percent(infill[kind]["one_per_step"]["exact"]),
                    )
                    for kind in reversed(ATTENTION)
                ),
            ),
        ),
        "An addition is a prompt `assert 37 + 85 ==`; its answer is cut at the line's end, and every forward "
        "counts, the prompt's included. Tokens per forward by threshold, without those after an end token "
        f"(infilled lines at a threshold: {infill['threshold_lines']} of them):",
        threshold_table(evaluation),
        f"Corpus sha256 `{corpus['sha256'][:16]}`. Measured on {environment['machine']} "
        f"({environment['cores']} cores) at commit `{environment['commit']}` with {versions}. All of it is "
        "in evaluation.json, from which this page is made.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _runs(training: dict) -> str:
    """Return a phrase for each run, beginning with the run that the others started from."""
    text = f"{training['steps']} steps in {training['minutes']:.0f} minutes"
    changed = [str(start["step"]) for start in training["resumed"] if start["settings"]]
    if changed:
        text += f" (settings were changed at steps {', '.join(changed)}, see evaluation.json)"
    if training.get("recipe") == "parallel_decoding":
        text += " on its own text, by `dllm_train.recipes.tiny_python.parallel`"
        last = {key: value for start in training["resumed"] for key, value in start["settings"].items()}
        share = (training["settings"] | last)["student_share"]
        if share < 1:
            text += f" (the weights are {share:.0%} the student's and {1 - share:.0%} those from before)"
    if "init" in training:
        text = f"{_runs(training['init'])}; from that checkpoint, without its optimisers' state, {text}"
    return text


def threshold_table(evaluation: dict) -> str:
    columns = {
        "additions, block_causal": evaluation["additions"],
        "completed code, block_causal": evaluation["completion"],
        **{f"infilled lines, {kind}": evaluation["infill"][kind] for kind in ATTENTION},
    }
    rows = []
    for threshold in ("one_per_step", *map(str, evaluation["thresholds"])):
        row = ["one token per step" if threshold == "one_per_step" else threshold]
        for figures in columns.values():
            exact = figures[threshold].get("exact")
            cell = f"{figures[threshold]['tokens_per_forward']:.2f}"
            row.append(cell if exact is None else f"{cell} ({percent(exact)} exact)")
        rows.append(row)
    return table(("threshold", *columns), rows)


def table(header, rows) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"
