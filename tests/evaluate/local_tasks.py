"""The kinds of task that lm-eval has, on small local files."""

import json
from pathlib import Path

import yaml

from dllm_train.evaluate import task_manager

# A model that says "7" with p 1/2, "a" with 1/4 and "b" with 1/8, whatever is around.
CHANCES = {"7": 0.5, "a": 0.25, "b": 0.125}

TASKS = {
    "choices": dict(
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_target="gold",
        doc_to_choice="choices",
        metric_list=[
            dict(metric=name, aggregation="mean", higher_is_better=True) for name in ("acc", "acc_norm")
        ],
    ),
    "numbers": dict(
        output_type="generate_until", doc_to_text="{{question}}", doc_to_target="answer",
        generation_kwargs=dict(until=["\n"], max_gen_toks=3, do_sample=False),
        filter_list=[
            dict(
                name="number",
                filter=[dict(function="regex", regex_pattern="(7+)"), dict(function="take_first")],
            )
        ],
        metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)],
    ),
    "texts": dict(
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
        metric_list=[dict(metric="bits_per_byte", aggregation="bits_per_byte", higher_is_better=False)],
    ),
    "words": dict(
        output_type="loglikelihood", doc_to_text="{{question}}", doc_to_target="answer", target_delimiter="",
        metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)],
    ),
}  # fmt: skip

ROWS = {
    # p("a") > p("b") and p("aa") = p("b") / 2: by sums a, a, b; by sums over bytes a, a, aa.
    "choices": [
        dict(question="one", choices=["a", "b"], gold=0),
        dict(question="two", choices=["b", "a"], gold=0),
        dict(question="three", choices=["aa", "b"], gold=1),
    ],
    "numbers": [dict(question=f"{n} is", answer=answer) for n, answer in enumerate(["777", "7", "777", "x"])],
    "texts": [dict(text=text) for text in ("abba", "77", "a7" * 40, "b")],
    "words": [dict(question=question, answer=answer) for question, answer in (("q", "77"), ("r", "7a"))],
}


def write_tasks(folder: Path, **changes) -> Path:
    """Write every task with its rows; changes: entries of their YAML files, by task."""
    for name, config in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        entries = dict(
            task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(data))),
            test_split="test", metadata=dict(version=3), **config,
        )  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(entries | changes.get(name, {})))
    return folder


def manager(folder: Path):
    """Return lm-eval's task manager for these tasks alone."""
    return task_manager(include_path=str(folder), include_defaults=False)
