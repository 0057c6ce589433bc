"""Write the table of the recipes' options into docs/training.md, from the dataclasses that parse them.

python tools/training_options.py
"""

import dataclasses
import re
from pathlib import Path

from transformers import TrainingArguments

from dllm_train.arguments import DataArguments, DiffusionTrainingArguments, ModelArguments
from dllm_train.recipes.pretrain import PretrainArguments
from dllm_train.recipes.training import ObjectiveArguments

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
PLACE = re.compile(r"(<!-- options -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = (ObjectiveArguments, PretrainArguments, ModelArguments, DataArguments, DiffusionTrainingArguments)


def options_table() -> str:
    """Return the Markdown table of every option that transformers lacks or gives another default."""
    lines = ["| Option | Default | Meaning |", "|---|---|---|"]
    inherited = {field.name: _default(field) for field in dataclasses.fields(TrainingArguments)}
    for kind in KINDS:
        for field in dataclasses.fields(kind):
            if field.name not in inherited or _default(field) != inherited[field.name]:
                text = field.metadata["help"].replace("|", r"\|")
                lines.append(f"| `{field.name}` | `{_default(field)}` | {text} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Return the text of the page with the table in its place."""
    return PLACE.sub(lambda found: found[1] + options_table() + found[2], page)


def _default(field: dataclasses.Field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
