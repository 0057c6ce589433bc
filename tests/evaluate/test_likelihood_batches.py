"""No batch, order, rank or neighbor changes an answer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_train.evaluate import noised_rows
from dllm_train.evaluate.likelihood import log_likelihoods
from tests.evaluate.test_likelihood import requests_of, values
from tests.evaluate.tiny_diffusion import marked

LENGTHS = [(9, 3), (0, 5), (2, 1), (17, 2), (5, 7), (2, 1)]
LONGEST = 19
ESTIMATORS = ("auto", "ar_ftb", "confidence")
ROUNDING = 1e-5  # of float32 matrix products, which depend on how many rows they have


@pytest.fixture(scope="module", params=["bidirectional", "block_causal"])
def model(request):
    return marked("qwen3", attention=request.param, num_hidden_layers=1)


class OneRowAtATime(torch.nn.Linear):
    """A linear layer whose rows cannot depend on how many there are."""

    def forward(self, states):
        rows = states.reshape(-1, states.shape[-1])
        return torch.cat([torch.nn.functional.linear(row[None], self.weight) for row in rows]).view(
            *states.shape[:-1], -1
        )


def without_batched_products(model):
    """A copy of `model` in which no matrix product spans rows."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = OneRowAtATime
    return model


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_batch_changes_nothing_but_rounding(model, estimator, batch):
    requests = requests_of(LENGTHS)
    options = dict(samples=4, estimator=estimator, check_greedy=True)
    alone = [log_likelihoods(model, [r], request_ids=[i], **options)[0] for i, r in enumerate(requests)]
    together = log_likelihoods(model, requests, batch_tokens=batch * LONGEST, **options)
    assert values(together) == pytest.approx(values(alone), rel=ROUNDING)
    assert [e.standard_error for e in together] == pytest.approx(
        [e.standard_error for e in alone], rel=1e-3, abs=1e-6
    )
    assert [e.is_greedy for e in together] == [e.is_greedy for e in alone]


def test_the_batch_changes_no_bit_of_a_bidirectional_model_but_by_matrix_products():
    model, requests = without_batched_products(marked("qwen3")), requests_of(LENGTHS)
    found = [log_likelihoods(model, requests, samples=4, batch_tokens=b * LONGEST) for b in (1, 3, 8)]
    assert found[0] == found[1] == found[2]


def test_ranks_find_together_what_one_finds(model):
    requests = requests_of(LENGTHS)
    shares = [range(rank, len(requests), 3) for rank in range(3)]
    whole = values(log_likelihoods(model, requests, samples=4))
    for share in shares:
        own = log_likelihoods(model, [requests[i] for i in share], samples=4, request_ids=list(share))
        assert values(own) == pytest.approx([whole[i] for i in share], rel=ROUNDING)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_order_and_any_budget_give_each_request_its_own_answer(model, data):
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 14), st.integers(1, 6)), min_size=1, max_size=6))
    requests = requests_of(lengths)
    order = data.draw(st.permutations(range(len(requests))))
    tokens = data.draw(st.integers(1, 200))
    expected = values(log_likelihoods(model, requests, samples=3, seed=7))
    found = log_likelihoods(
        model, [requests[i] for i in order], samples=3, seed=7, request_ids=list(order), batch_tokens=tokens
    )
    assert values(found) == pytest.approx([expected[i] for i in order], rel=ROUNDING)


def test_a_long_prefix_is_computed_once_for_many_rows(model, monkeypatch):
    requests, tokens = requests_of([(30, 7)]), []
    packed = noised_rows.PackedRows.of

    def counted(*arguments):
        made = packed(*arguments)
        tokens.append(made.ids.shape[1])
        return made

    monkeypatch.setattr(noised_rows.PackedRows, "of", counted)
    log_likelihoods(model, requests, samples=64, batch_tokens=10_000)
    if model.config.diffusion["attention"] == ["block_causal"]:
        # Blocks of 4 from 28 and 32: 2, 4 and 1 targets have at most 3, 15 and 1 masks.
        assert len(tokens) == 1 and tokens[0] <= 36 + (3 + 15 + 1) * 4
    else:
        assert sum(tokens) <= 64 * 37


def test_equal_rows_of_different_requests_are_computed_once(monkeypatch):
    """Four answers of one token to one question need one forward over one row."""
    model, ((context, _),), tokens = marked(), requests_of([(10, 1)]), []
    packed = noised_rows.PackedRows.of

    def counted(*arguments):
        made = packed(*arguments)
        tokens.append(made.ids.shape[1])
        return made

    monkeypatch.setattr(noised_rows.PackedRows, "of", counted)
    answers = log_likelihoods(model, [(context, [token]) for token in (5, 6, 7, 8)])
    assert tokens == [11] and len(set(values(answers))) == 4


def test_progress_goes_from_little_to_all():
    seen = []
    log_likelihoods(
        marked(), requests_of(LENGTHS), samples=4, batch_tokens=8, check_greedy=True,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert len({total for _, total in seen}) == 1
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1] and len(seen) > 2
