"""The table of families in docs/models.md is FAMILIES."""

import re
from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from dllm_kernels.models.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def line(name: str) -> str:
    family = FAMILIES[name]
    classes = MODEL_FOR_MASKED_LM_MAPPING_NAMES if family.masked_lm else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ends = ", ".join(f"`{token}`".replace("|", "\\|") for token in family.end_tokens)
    attention = ", ".join(family.attention) or "its config says"
    cells = (f"`{name}`", classes[family.architecture], attention, "yes" if family.shift else "", ends)
    return f"| {' | '.join(cells)} |"


def test_the_table_lists_every_family():
    table = re.search(r"<!-- families -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.DOTALL)[1]
    assert table.splitlines()[2:] == [line(name) for name in FAMILIES]
