"""Python sources small enough to train on in seconds."""

import pytest

from dllm_train.recipes.tiny_python.data import collect_sources, split


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory):
    """40 Python files in a few folders, some of them held out."""
    root = tmp_path_factory.mktemp("sources")
    for i in range(40):
        path = root / f"package{i % 4}" / f"file{i}.py"
        path.parent.mkdir(exist_ok=True)
        lines = [f"def function_{i}_{j}(value):\n    return value * {i * j} + {j}\n\n\n" for j in range(12)]
        path.write_text("".join(lines))
    assert split(collect_sources(root))[1]
    return root
