"""`import dllm_kernels` is cheap, and its names are found on first use."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import dllm_kernels
import dllm_train

STUB = ast.parse(Path(dllm_kernels.__file__).with_suffix(".pyi").read_text())


@pytest.mark.parametrize("package", ["dllm_kernels", "dllm_train"])
def test_importing_a_package_imports_nothing_heavy(package):
    program = (
        f"import sys, {package}; dir({package}); {package}.__all__;"
        "print(sorted({'torch', 'numpy', 'transformers', 'typer', 'datasets', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dir_lists_every_public_name():
    assert set(dllm_kernels.__all__) <= set(dir(dllm_kernels))
    assert {"SpanMask", "linear_token_stats", "commit_", "sample"} <= set(dllm_kernels.__all__)


def test_a_name_is_looked_up_once():
    from dllm_kernels.span_mask import SpanMask

    assert dllm_kernels.SpanMask is SpanMask
    assert vars(dllm_kernels)["SpanMask"] is SpanMask


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dllm_kernels' has no attribute 'samples'"):
        dllm_kernels.samples  # noqa: B018


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in (dllm_kernels, dllm_train) for name in package.__all__],
)
def test_every_listed_name_exists(package, name):
    assert getattr(package, name) is not None


def test_checkers_see_the_public_names_of_the_training_package_and_no_others():
    tree = ast.parse(Path(dllm_train.__file__).read_text())
    imported = [
        name.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
    ]
    assert sorted(set(imported) - {None}) == sorted(dllm_train.__all__)


def test_the_stub_declares_the_public_names_and_no_others():
    """A checker sees a name of a stub only as `import X as X` or as an annotated variable."""
    imported = [name for node in STUB.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert all(name.asname == name.name for name in imported)
    declared = [node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)]
    assert sorted([*declared, *(name.name for name in imported)]) == sorted(dllm_kernels.__all__)


def test_the_stub_imports_the_objects_that_users_get():
    for node in STUB.body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert getattr(module, name.name) is getattr(dllm_kernels, name.name)


@pytest.mark.parametrize("package", [dllm_kernels, dllm_train])
def test_the_packages_are_marked_as_typed(package):
    assert (Path(package.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", ["token_stats", "linear_token_stats", "unmask_"])
def test_signatures_show_the_options_of_statistics(name):
    parameters = inspect.signature(getattr(dllm_kernels, name)).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    shown = {
        option: parameters[option].default
        for option in ("temperature", "top_k", "precision", "suppress_tokens")
    }
    assert shown == {"temperature": 0.0, "top_k": None, "precision": "float32", "suppress_tokens": None}
