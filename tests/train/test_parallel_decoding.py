"""The recipe for parallel decoding: loops, states of decoding, and micro runs of the whole."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, Qwen3Config, Qwen3ForCausalLM

import dllm_kernels as dk
from dllm_train.noise import Noise
from dllm_train.objectives import mdlm_loss
from dllm_train.recipes import own_text, parallel_decoding, student_losses
from dllm_train.recipes.parallel_decoding import Settings, Teaching
from dllm_train.recipes.student_losses import StudentLosses, margin_loss
from dllm_train.recipes.tiny_python.tokenizer import train_tokenizer

BLOCK = 8
NEWLINE, END = 0, 1
TEXTS = [
    "".join(f"def f_{i}_{j}(a):\n    b = a * {j}\n    return b + {i}\n\n" for j in range(8))
    for i in range(24)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def micro_checkpoint(folder, tokenizer, attention):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=64,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.diffusion = {"block_size": BLOCK, "attention": attention, "shift": False}
    dk.save(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory, tokenizer):
    """A checkpoint of both kinds of attention."""
    folder = tmp_path_factory.mktemp("both")
    return micro_checkpoint(folder, tokenizer, ["block_causal", "bidirectional"])


@pytest.fixture(scope="module", params=["both", "bidirectional"])
def checkpoint(request, both, tmp_path_factory, tokenizer):
    if request.param == "both":
        return both
    return micro_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer, ["bidirectional"])


SETTINGS = Settings(
    rounds=2, steps=2, length=48, prompts=6, gap_rows=4, memory=2, rows=4, loops=2, threshold=0.5,
    learning_rate=1e-3,
)  # fmt: skip


def teaching(checkpoint, output, **changes):
    model, tokenizer = dk.load(checkpoint, dtype=torch.float32)
    stream = np.concatenate([tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS])
    output.mkdir(exist_ok=True)

    def row(index):
        start = index * 17 % (len(stream) - SETTINGS.length)
        return stream[start : start + SETTINGS.length]

    return Teaching(model, tokenizer, row, output, Settings(**(vars(SETTINGS) | changes)))


# ---- loops ----------------------------------------------------------------------------------------------
def ends(vocabulary=100):
    ends = np.zeros(vocabulary, dtype=bool)
    ends[[NEWLINE, END]] = True
    return ends


@pytest.mark.parametrize(
    ("context", "ids", "expected"),
    [
        ([5, 6, 7, NEWLINE], [5, 6, 7, NEWLINE, 8, 9], (0, 4)),  # a line like the one before
        ([5, 6, 7, NEWLINE, NEWLINE], [5, 6, 7, NEWLINE], (0, 4)),  # empty lines do not count
        ([5, 6, 7, NEWLINE, 5], [6, 7, NEWLINE], (0, 3)),  # a line that the context began
        ([*range(5, 20), NEWLINE], [4, NEWLINE, *range(5, 13)], None),
        ([*range(5, 20), NEWLINE], [*range(5, 13)], (0, 8)),  # eight tokens of an unfinished line
        ([*range(5, 20), NEWLINE], [*range(5, 12)], None),  # seven
        ([5, 6, 7, 8, 0, 9, 0, 5, 6, 7, 8, 0, 9, 0], [5, 6, 7, 8, 0], (0, 5)),  # a third time
        ([5, 6, 7, 0, 9, 0, 5, 6, 7, 0, 8, 0], [5, 6, 7, 0], None),  # short lines may come back
        ([*range(20, 50)], [5] * 8, (0, 6)),  # four times the same three tokens
        ([*range(20, 50)], [5] * 5, None),
    ],
)
def test_loops_are_found_where_they_begin(context, ids, expected):
    assert own_text.find_loop(context, ids, ends()) == expected


def test_a_loop_of_the_context_alone_is_none():
    assert own_text.find_loop([5, 6, 0, 5, 6, 0], [7, 8], ends()) is None


def test_common_phrases_are_not_trained():
    def text(ids):
        return own_text.Completion([1], list(ids), [0] * len(ids), [True] * len(ids))

    shared, own, twice = range(10, 18), range(20, 29), range(30, 38)
    texts = [text([*shared, 40 + number, *own]) for number in range(4)]
    for number, completion in enumerate(texts[1:]):
        completion.ids[9:] = range(50 + 10 * number, 59 + 10 * number)
    texts.append(text([*twice, 5, *twice]))
    texts.append(text(twice))
    share = own_text.leave_out_common_phrases(texts)
    for completion in texts[:4]:
        assert completion.trained == [False] * 8 + [True] * 10
    assert texts[4].trained == [True] * 9 + [False] * 8  # the second time
    assert all(texts[5].trained)  # one other completion has it
    assert share == (4 * 8 + 8) / (4 * 18 + 17 + 8)


def test_gaps_are_single_lines_without_their_ends():
    rng, ids = np.random.default_rng(0), [2, 3, 0, 4, 0, 5, 6, 0, 0, 7, 8, 9, 0, *range(10, 40), 0, 2, 0, 3]
    for _ in range(50):
        gaps = own_text.choose_gaps(ids, ends(), rng)
        for start, end in gaps:
            assert 0 < end - start <= 24
            assert ids[start - 1] == ids[end] == NEWLINE
            assert NEWLINE not in ids[start:end]
        assert all(end + 1 < start for (_, end), (start, _) in pairwise(gaps))


def test_ends_of_lines_are_read_from_the_text_of_tokens(tokenizer):
    found = own_text.ends_line(tokenizer, (tokenizer.eos_token_id,))
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert [i for i in range(len(texts)) if found[i]] == [
        i for i, text in enumerate(texts) if "\n" in text or i == tokenizer.eos_token_id
    ]


# ---- states of decoding ---------------------------------------------------------------------------------
def test_states_of_decoding_mask_a_block_or_its_end():
    written = torch.ones(400, 4 * BLOCK, dtype=torch.bool)
    written[:, :11] = False
    masked = own_text.states_of_decoding(written, BLOCK, np.random.default_rng(0))
    assert not masked[~written].any()
    blocks = masked[:, 2 * BLOCK :].reshape(-1, BLOCK)
    whole = blocks.all(1)
    assert 0.5 < whole.float().mean() < 0.65
    assert blocks.any(1).float().mean() > 0.95
    suffixes = blocks.int().diff(dim=1).clamp(max=0).eq(0).all(1)
    assert 0.8 < suffixes.float().mean() < 0.95
    assert not masked[:, :BLOCK].any()


def test_states_passed_are_those_before_a_forward():
    """Of two blocks, each before a forward of its own, with what that one wrote."""
    steps = torch.tensor([[-1, -1, -1, 2, 0, 1, 1, 3, 0, 0, 2, 2, 1, 0, 5, -1]] * 200)
    masked, written = own_text.states_passed(steps, BLOCK, np.random.default_rng(0))
    seen = set()
    for row in range(len(steps)):
        for block in (slice(0, BLOCK), slice(BLOCK, 2 * BLOCK)):
            (now,) = steps[row, block][written[row, block]].unique().tolist()
            for step, hidden, new in zip(
                steps[row, block].tolist(),
                masked[row, block].tolist(),
                written[row, block].tolist(),
                strict=True,
            ):
                assert (hidden, new) == (step >= now, step == now)
            seen.add((block.start, now))
    assert seen == {(0, 0), (0, 1), (0, 2), (0, 3), (BLOCK, 0), (BLOCK, 1), (BLOCK, 2), (BLOCK, 5)}


def test_rows_that_nothing_wrote_have_no_state():
    masked, written = own_text.states_passed(
        torch.full((2, 20), own_text.NEVER), BLOCK, np.random.default_rng(0)
    )
    assert not masked.any() and not written.any()


def test_the_margin_loss_is_written_out():
    table, tokens = torch.randn(6, 9), torch.randint(0, 9, (6,))
    losses = margin_loss(table, tokens, 0.5)
    for loss, logits, token in zip(losses, table.tolist(), tokens.tolist(), strict=True):
        best = max(logit for other, logit in enumerate(logits) if other != token)
        assert float(loss) == pytest.approx(math.log1p(math.exp(0.5 + logits[token] - best)), rel=1e-5)


# ---- the judge ------------------------------------------------------------------------------------------
def log_probabilities(checkpoint, kind, ids, masked):
    """Return float32 [B, L, V] where tokens of ids [B, L] are masked, one plain forward per block."""
    model, tokenizer = dk.load(checkpoint, dtype=torch.float32, attention=kind)
    noised = torch.where(masked, tokenizer.mask_token_id, ids)
    size = BLOCK if kind == "block_causal" else ids.shape[1]
    with torch.no_grad():
        blocks = [
            model(torch.cat([ids[:, :first], noised[:, first : first + size]], dim=1)).logits[:, first:]
            for first in range(0, ids.shape[1], size)
        ]
    logits = torch.cat(blocks, dim=1)
    logits[..., tokenizer.mask_token_id] = -torch.inf
    return logits.log_softmax(-1)


def of_tokens(log_probabilities, ids):
    return log_probabilities.gather(2, ids[..., None])[..., 0]


def test_every_written_token_is_judged_beside_its_neighbours(checkpoint, tmp_path):
    run = teaching(checkpoint, tmp_path)
    texts, figures = run.write()
    for kind, name in [(run.completing, "completions"), *((kind, kind) for kind in run.kinds)]:
        assert texts[name]
        wrong = count = 0
        for text in texts[name]:
            ids = torch.full((1, SETTINGS.length), run.mask_id)
            ids[0, : len(text.whole)] = torch.tensor(text.whole)
            start = len(text.whole) - len(text.steps)
            for place, (step, judged) in enumerate(zip(text.steps, text.judged, strict=True), start):
                if step == own_text.NEVER:
                    assert math.isnan(judged)
                    continue
                masked = torch.zeros(ids.shape, dtype=torch.bool)
                for other, its_step in enumerate(text.steps, start):
                    masked[0, other] = its_step != own_text.NEVER and other % 2 == place % 2
                expected = of_tokens(log_probabilities(checkpoint, kind, ids, masked), ids)[0, place].exp()
                assert judged == pytest.approx(float(expected), rel=1e-3)
                wrong, count = wrong + (judged < SETTINGS.unlikely), count + 1
        key = "unlikely_completed" if name == "completions" else f"unlikely_{kind}"
        assert figures[key] == pytest.approx(wrong / count)


def test_likely_tokens_are_learned_and_unlikely_ones_unlearned(checkpoint, tmp_path, monkeypatch):
    run = teaching(checkpoint, tmp_path, caution=3.0)
    rng = np.random.default_rng(3)
    steps = torch.from_numpy(rng.integers(-1, 3, (4, SETTINGS.length)))
    ids = torch.from_numpy(rng.integers(5, 200, (4, SETTINGS.length)))
    judged = torch.from_numpy(rng.choice([0.0, 0.019, 0.021, 0.19, 0.21, 1.0, np.nan], (4, SETTINGS.length)))
    monkeypatch.setattr(own_text, "states_passed", lambda steps, *_: (steps >= 1, steps == 1))
    for kind in run.kinds:
        p = of_tokens(log_probabilities(checkpoint, kind, ids, steps >= 1), ids).exp()
        losses = [
            1 - p if verdict > 0.2 else 3 * p
            for p, verdict in zip(p[steps == 1].tolist(), judged[steps == 1].tolist(), strict=True)
            if verdict > 0.2 or verdict < 0.02
        ]
        loss = run.losses.judged(kind, ids, steps, judged, rng)
        assert float(loss.detach()) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_given_text_of_gaps_is_learned(checkpoint, tmp_path, monkeypatch):
    run, seen = teaching(checkpoint, tmp_path), []
    texts, predictions = run.write()[0], run.losses.predictions
    monkeypatch.setattr(
        run.losses, "predictions", lambda *arguments: seen.append(arguments) or predictions(*arguments)
    )
    for kind in run.kinds:
        loss = run.losses.given(kind, texts[kind], np.random.default_rng(5))
        _, _, ids, masked, _ = seen.pop()
        rows = {tuple(text.given): text.gaps for text in texts[kind]}
        for row, hidden in zip(ids.tolist(), masked, strict=True):
            within = torch.zeros_like(hidden)
            for start, end in rows[tuple(row)]:
                within[start:end] = True
            assert not (hidden & ~within).any()
        expected = -of_tokens(log_probabilities(checkpoint, kind, ids, masked), ids)[masked].mean()
        assert masked.any() and float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_common_phrases_are_unlearned_alone(checkpoint, tmp_path, monkeypatch):
    """What of a common phrase the judge finds unlikely has a loss, and no more."""
    run = teaching(checkpoint, tmp_path)
    text = own_text.Completion([5] * 16, [*range(6, 10)], [0] * 4, [True, True, False, False], [1, 0, 1, 0])
    seen = []
    monkeypatch.setattr(run.losses, "judged", lambda kind, ids, steps, judged, rng: seen.append(judged))
    run.losses.completed([text], np.random.default_rng(0))
    assert seen[0][0, 16:20].tolist()[:2] == [1, 0]
    assert seen[0][0, 16:20].isnan().tolist() == [False, False, True, False]


def test_gaps_that_are_not_chosen_have_the_given_text(both, tmp_path, monkeypatch):
    run, seen = teaching(both, tmp_path), []
    gaps = [(start, start + 2) for start in range(0, 40, 4)]
    steps = [0 if place % 4 < 2 else own_text.NEVER for place in range(40)]
    row = own_text.FilledRow([7] * 40, [8 if step == 0 else 7 for step in steps], steps, gaps, [0.5] * 40)
    monkeypatch.setattr(run.losses, "judged", lambda kind, ids, steps, judged, rng: seen.append((ids, steps)))
    run.losses.filled("bidirectional", [row], np.random.default_rng(0))
    for ids, steps in zip(*seen[0], strict=True):
        assert ((ids == 8) == (steps == 0)).all() and int((ids == 8).sum()) == 2 * 6


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "albert"])
def test_heads_of_several_layers_are_applied_whole(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=60, hidden_size=16, embedding_size=8, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config).eval()
    model.config.mask_token_id = 59
    losses = StudentLosses(model, SETTINGS, completing="bidirectional", block_size=BLOCK, bos_id=None)
    ids = torch.randint(3, 50, (2, SETTINGS.length))
    masked = torch.rand(ids.shape) < 0.3
    with torch.no_grad():
        found, tokens = losses.predictions(model, "bidirectional", ids, masked, masked)
        expected = model(ids.masked_fill(masked, 59)).logits[masked]
    torch.testing.assert_close(found[:, :59], expected[:, :59], atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, ids[masked])


# ---- runs -----------------------------------------------------------------------------------------------
def test_completions_follow_their_prompts(checkpoint, tmp_path):
    run = teaching(checkpoint, tmp_path)
    texts, _ = run.write()
    for text in texts["completions"]:
        assert len(text.prompt) + len(text.ids) <= SETTINGS.length
        assert len(text.trained) == len(text.steps) == len(text.judged) == len(text.ids)
        assert min(text.steps) == 0
        assert own_text.find_loop(text.prompt, text.ids, run.ends) is None
    for loop in texts["loops"]:
        assert 0 < loop.start < loop.end <= len(loop.ids) <= SETTINGS.length
    for kind in run.kinds:
        for text in texts[kind]:
            shown = np.ones(SETTINGS.length, dtype=bool)
            for start, end in text.gaps:
                shown[start:end] = False
            assert np.array_equal(np.array(text.given)[shown], np.array(text.whole)[shown])
            assert np.array_equal(np.array(text.steps) == own_text.NEVER, shown)
            assert run.mask_id not in text.whole


def test_a_resumed_run_equals_an_uninterrupted_one(both, tmp_path):
    whole = teaching(both, tmp_path / "whole")
    whole.run()
    first = teaching(both, tmp_path / "parts")

    def interrupted(step=first.train_step):
        if first.step == 3:
            raise KeyboardInterrupt
        return step()

    first.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = teaching(both, tmp_path / "parts")
    second.load()
    assert second.round == 1
    second.run()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])


def test_every_round_leaves_a_checkpoint_and_its_figures(both, tmp_path):
    run = teaching(both, tmp_path)
    run.run()
    model, _ = dk.load(tmp_path / "model", dtype=torch.float32)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    rounds = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rounds[0]["settings"] == vars(run.settings)
    assert [(entry["round"], entry["step"]) for entry in rounds[1:]] == [(1, 2), (2, 4)]
    assert all(f"real_{kind}" in rounds[1] for kind in run.kinds)


@pytest.mark.parametrize("name", ["completed", "filled", "given", "loops"])
def test_steps_on_one_loss_lower_it(checkpoint, tmp_path, name):
    run = teaching(checkpoint, tmp_path)
    texts, kind = run.write()[0], run.kinds[-1]
    arguments = {
        "completed": (texts["completions"],),
        "loops": ([own_text.Loop([5, 6, 7, 8] * 10, 32, 40)],),
    }.get(name, (kind, texts[kind]))

    def loss():
        return getattr(run.losses, name)(*arguments, np.random.default_rng(0))

    before = loss()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < before


@pytest.mark.parametrize(
    ("ids", "start", "end", "loss"),
    [
        ([*range(20, 24)] * 3, 8, 12, 20.0),  # a line: one token
        ([*range(20, 28), 5, 6, 5, 6, 5, 6, 30, 5], 8, 12, (3 * 6 + 4 * 5) / 7),  # all that alternate
    ],
)
def test_what_of_a_loop_has_to_lose(checkpoint, tmp_path, monkeypatch, ids, start, end, loss):
    run = teaching(checkpoint, tmp_path)
    monkeypatch.setattr(own_text, "states_of_decoding", lambda written, *_: written)
    monkeypatch.setattr(student_losses, "margin_loss", lambda logits, tokens, margin: tokens.float())
    found = run.losses.loops([own_text.Loop(ids, start, end)], np.random.default_rng(0))
    assert found == pytest.approx(loss)


def test_the_command_reads_a_dataset(tmp_path, tokenizer):
    checkpoint = micro_checkpoint(tmp_path / "checkpoint", tokenizer, ["block_causal"])
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = ["--model", str(checkpoint), "--dataset", str(file), "--output", str(tmp_path / "out")]
    sizes = ["--rounds", "1", "--steps", "1", "--length", "48", "--prompts", "2", "--gap-rows", "2"]
    parallel_decoding.main([*command, *sizes])
    _, loaded = dk.load(tmp_path / "out" / "model")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    parallel_decoding.main([*command, *sizes[:1], "2", *sizes[2:], "--resume"])
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry.get("round") for entry in log] == [None, 1, None, 2]


def test_the_finished_weights_are_a_mix(tmp_path, tokenizer):
    checkpoint = micro_checkpoint(tmp_path / "checkpoint", tokenizer, ["block_causal"])
    before, _ = dk.load(checkpoint, dtype=torch.float32)
    run = teaching(checkpoint, tmp_path / "student")
    run.run()
    model, _ = dk.load(checkpoint, dtype=torch.float32)
    settings = Settings(**(vars(SETTINGS) | {"student_share": 0.25}))
    parallel_decoding.teach(model, tokenizer, run.row, tmp_path / "mixed", settings)
    mixed, _ = dk.load(tmp_path / "mixed" / "model", dtype=torch.float32)
    for (_, a), (_, b), (_, c) in zip(
        before.named_parameters(), run.model.named_parameters(), mixed.named_parameters(), strict=True
    ):
        torch.testing.assert_close(c, 0.75 * a + 0.25 * b)


def test_certainty_of_one_right_token_has_a_finite_gradient(tmp_path, tokenizer):
    checkpoint = micro_checkpoint(tmp_path / "checkpoint", tokenizer, ["bidirectional"])
    model, _ = dk.load(checkpoint, dtype=torch.float32)
    ids, mask_id = torch.tensor([[5, 6, 7, 8]]), tokenizer.mask_token_id
    masked = torch.tensor([[False, True, False, False]])
    with torch.no_grad():
        logits = model(ids.masked_fill(masked, mask_id)).logits[0, 1]
        logits[mask_id] = float("-inf")
        ids[0, 1] = logits.argmax()
    noise = Noise(torch.ones(1, 4), masked)
    output = mdlm_loss(model, ids, mask_id=mask_id, noise=noise, certainty_weight=8.0, bar_mask_token=True)
    output.loss.backward()
    assert int(output.right) == 1
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- refusals -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "value"), [("length", 24), ("rows", 0), ("prompts", 0), ("gap_rows", 0)])
def test_settings_that_cannot_work_are_named(both, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; expected"):
        teaching(both, tmp_path, **{name: value})


def test_a_judge_of_other_tokens_is_refused(both, tmp_path):
    run = teaching(both, tmp_path)
    other, _ = dk.load(both, dtype=torch.float32)
    other.resize_token_embeddings(other.config.vocab_size + 1)
    with pytest.raises(ValueError, match=r"^judge has vocab_size .*; expected the model's"):
        Teaching(run.model, run.tokenizer, run.row, tmp_path, run.settings, judge=other)


def test_weights_of_other_shapes_are_not_mixed(both, tmp_path):
    run = teaching(both, tmp_path)
    config = Qwen3Config(**(run.model.config.to_dict() | {"intermediate_size": 32}))
    other = Qwen3ForCausalLM(config)
    mixed = Settings(**(vars(SETTINGS) | {"student_share": 0.5}))
    with pytest.raises(ValueError, match=r"^student_share is 0\.5; expected 1, since the judge"):
        Teaching(run.model, run.tokenizer, run.row, tmp_path, mixed, judge=other)
    Teaching(run.model, run.tokenizer, run.row, tmp_path, SETTINGS, judge=other)


def test_resuming_without_a_state_is_refused(both, tmp_path):
    with pytest.raises(ValueError, match=r"^resume: .* does not exist"):
        teaching(both, tmp_path).load()
