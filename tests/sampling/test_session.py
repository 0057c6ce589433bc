"""A session gives the tokens of `dk.sample`, and computes no position again that is final."""

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling.session import Session
from tests.sampling.tiny_models import prompts_of, tiny_model

SIZE = 8
OPTIONS = dict(threshold=0.6, max_new_tokens=20, block_size=SIZE, stop_on_eos=False)


class Computed:
    """The number of tokens that each forward of a model computed."""

    def __init__(self, model):
        self.counts = []
        self.hook = model.model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, arguments, options):
        self.counts.append(options["input_ids"].shape[1])

    def __enter__(self):
        return self.counts

    def __exit__(self, *_):
        self.hook.remove()


def turns(session, count, model, **options):
    """Let a text grow by what is generated and by new tokens; check each turn against `dk.sample`."""
    text = prompts_of(37)[0]
    for turn in range(count):
        expected = dk.sample(model, [text], **options)
        with Computed(model) as computed:
            output = session.sample([text], **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.unmask_step, expected.unmask_step)
        yield len(text), session.reused, computed
        text = output.sequences[0].tolist() + prompts_of(5, seed=turn + 1)[0]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_turns_compute_what_is_new(architecture, shift):
    model = tiny_model(architecture)
    before = 0
    for prompt, reused, computed in turns(Session(model), 4, model, shift=shift, **OPTIONS):
        end = -(-(prompt + 1) // SIZE) * SIZE
        assert computed[0] == end - reused
        if before:
            # all but the last block of the turn before, whose keys and values were not final yet
            assert before - 2 * SIZE < reused <= prompt and reused % SIZE == 0
        before = prompt + OPTIONS["max_new_tokens"]
    assert reused > 0


def test_a_text_that_changes_is_computed_from_where_it_changes():
    model = tiny_model()
    session = Session(model)
    text = prompts_of(40)[0]
    session.sample([text], **OPTIONS)
    text[19] = (text[19] + 1) % 100
    output = session.sample([text], **OPTIONS)
    assert session.reused == 16
    assert torch.equal(output.sequences, dk.sample(model, [text], **OPTIONS).sequences)


@pytest.mark.parametrize(
    "change", [dict(block_size=4), dict(cfg_scale=1.0), dict(cache="none"), dict(shift=True)], ids=str
)
def test_options_that_change_keys_and_values_begin_anew(change):
    model = tiny_model()
    session = Session(model)
    text = prompts_of(40)[0]
    session.sample([text], **OPTIONS)
    output = session.sample([text], **{**OPTIONS, **change})
    assert session.reused == 0
    expected = dk.sample(model, [text], **{**OPTIONS, **change})
    assert torch.equal(output.sequences, expected.sequences)


def test_other_options_go_on():
    session = Session(tiny_model())
    text = prompts_of(40)[0]
    session.sample([text], **OPTIONS)
    session.sample([text], **{**OPTIONS, "threshold": 0.9, "temperature": 0.5, "max_new_tokens": 40})
    assert session.reused == 40


def test_bidirectional_models_keep_nothing():
    model = tiny_model(attention="bidirectional")
    for _, reused, _ in turns(Session(model), 2, model, **OPTIONS):
        assert reused == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_interrupt_a_session_goes_on(error):
    model = tiny_model()
    session = Session(model)
    text = prompts_of(40)[0]
    rounds = []

    def interrupt(event):
        rounds.append(event.forwards)
        if len(rounds) == 4:
            raise error

    with pytest.raises(error):
        session.sample([text], on_round=interrupt, **OPTIONS)
    output = session.sample([text], **OPTIONS)
    assert session.reused == 40
    assert torch.equal(output.sequences, dk.sample(model, [text], **OPTIONS).sequences)


def test_after_a_refused_call_a_session_goes_on():
    session = Session(tiny_model())
    text = prompts_of(40)[0]
    session.sample([text], **OPTIONS)
    for wrong in ([text, text], [[]], [text * 20]):
        with pytest.raises(ValueError):
            session.sample(wrong, **OPTIONS)
    session.sample([text], **OPTIONS)
    assert session.reused == 40


def test_a_closed_session_begins_anew():
    session = Session(tiny_model())
    text = prompts_of(40)[0]
    session.sample([text], **OPTIONS)
    session.close()
    session.sample([text], **OPTIONS)
    assert session.reused == 0
