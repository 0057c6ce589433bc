"""compile=True: the tokens of the uncompiled model, one graph for every view, the model left as it was."""

import functools
import gc
import weakref

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.models import compiled
from dllm_kernels.sampling import plain_loop
from tests.models.test_attention_hook import MODELS, untrained
from tests.sampling.test_oracle import assert_rows_equal
from tests.sampling.tiny_models import prompts_of, tiny_model


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces, and runs what it traced with torch's own operators: the graphs that were made."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


@pytest.fixture
def by_layer(monkeypatch):
    """Compile the layers, as on CUDA."""
    on_cpu = compiled._regions

    def regions(model):
        layers = on_cpu(model)[0].layers
        return [*layers]

    monkeypatch.setattr(compiled, "_regions", regions)


def fresh_model(**options):
    """A tiny model that nothing was compiled for."""
    tiny_model.cache_clear()
    return tiny_model(**options)


@pytest.mark.parametrize(
    ("attention", "cache"), [("block_causal", "block"), ("bidirectional", "none"), ("bidirectional", "dual")]
)
def test_tokens_are_those_of_the_plain_loop(attention, cache, record_property):
    """Compiled to machine code; unequal prompts, two at a time, with noise."""
    model, prompts = tiny_model(attention=attention), prompts_of(3, 9, 25, 8)
    refresh = {"refresh_every": 1} if cache == "dual" else {}
    options = dict(
        max_new_tokens=21, block_size=8, threshold=0.3, temperature=0.5, seed=3, cache=cache, **refresh
    )
    rows = [
        plain_loop.sample_row(model, p, dk.SampleConfig(**options), sequence=i) for i, p in enumerate(prompts)
    ]
    output = dk.sample(model, prompts, max_batch=2, compile=True, **options)
    assert_rows_equal(output, rows, record_property)


def test_one_graph_for_every_view(traced):
    """Prompts of all lengths, first and later steps of a block, refreshes, one row and several."""
    model = fresh_model(attention="bidirectional")
    for lengths in [(3, 9, 25), (40,), (2, 2)]:
        for cache in ("none", "prefix", "dual"):
            prompts = prompts_of(*lengths)
            options = dict(max_new_tokens=13, block_size=8, cache=cache)
            expected = dk.sample(model, prompts, **options)
            assert torch.equal(
                dk.sample(model, prompts, compile=True, **options).sequences, expected.sequences
            )
    assert len(traced) == 1


def test_one_graph_for_all_layers(traced, by_layer):
    model = fresh_model(num_hidden_layers=5)
    expected = dk.sample(model, prompts_of(33), max_new_tokens=13, threshold=0.3)
    output = dk.sample(model, prompts_of(33), max_new_tokens=13, threshold=0.3, compile=True)
    assert torch.equal(output.sequences, expected.sequences)
    assert len(traced) == 1


def test_sliding_layers_by_themselves(traced, by_layer):
    """Layers that differ get a graph for each kind."""
    window = dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
    model = fresh_model(num_hidden_layers=4, **window)
    expected = dk.sample(model, prompts_of(30), max_new_tokens=13, threshold=0.3)
    output = dk.sample(model, prompts_of(30), max_new_tokens=13, threshold=0.3, compile=True)
    assert torch.equal(output.sequences, expected.sequences)
    assert len(traced) == 2


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name, traced):
    torch.manual_seed(2)
    model = untrained(name)
    model.config.mask_token_id = 63
    model.config.diffusion = {"attention": ["bidirectional"]}
    prompts, options = [[5, 6, 7], [8] * 11], dict(max_new_tokens=9, block_size=4, eos_ids=())
    expected = dk.sample(model, prompts, **options)
    output = dk.sample(model, prompts, **options, compile=True)
    assert torch.equal(output.sequences, expected.sequences)
    assert traced


def test_new_weights_take_effect(traced):
    """In place, and as other modules."""
    model = fresh_model()

    def tokens(**options):
        return dk.sample(model, prompts_of(9), max_new_tokens=13, threshold=0.3, **options).sequences

    before = tokens(compile=True)
    for parameter in model.parameters():
        parameter.data.neg_()
    assert torch.equal(tokens(compile=True), tokens())
    assert not torch.equal(tokens(), before)
    layer = model.model.layers[0]
    layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj, torch.nn.Tanh())
    assert torch.equal(tokens(compile=True), tokens())


@pytest.mark.parametrize(
    ("where", "put_on"),
    [
        ("layers.1", "register_forward_hook"),
        ("layers.0.mlp.up_proj", "register_forward_pre_hook"),
        ("rotary_emb", "register_forward_hook"),
    ],
)
def test_hooks_act_as_in_the_uncompiled_model(where, put_on, traced):
    """Put on after the first call, and taken off again."""
    model = fresh_model()

    def tokens(**options):
        return dk.sample(model, prompts_of(9), max_new_tokens=13, threshold=0.3, **options).sequences

    def negated(module, *tensors):
        first, *others = tensors[-1] if isinstance(tensors[-1], tuple) else (tensors[-1],)
        return (-first, *others) if isinstance(tensors[-1], tuple) else -first

    plain = tokens(compile=True)
    handle = getattr(model.model.get_submodule(where), put_on)(negated)
    with_hook = tokens(compile=True)
    assert torch.equal(with_hook, tokens()) and not torch.equal(with_hook, plain)
    handle.remove()
    assert torch.equal(tokens(compile=True), plain)


def test_a_forward_replaced_after_the_first_call(traced, monkeypatch):
    """Of a class, and of one module."""
    model = fresh_model()

    def tokens(**options):
        return dk.sample(model, prompts_of(9), max_new_tokens=13, threshold=0.3, **options).sequences

    plain, mlp = tokens(compile=True), model.model.layers[0].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: -x)
    assert torch.equal(tokens(compile=True), tokens()) and not torch.equal(tokens(), plain)
    monkeypatch.undo()
    forward = type(mlp).forward
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: -forward(self, x))
    assert torch.equal(tokens(compile=True), tokens()) and not torch.equal(tokens(), plain)


def test_another_dtype_after_the_first_call(traced):
    model = fresh_model()
    for change in (model.bfloat16, model.float, model.bfloat16):
        change()
        options = dict(max_new_tokens=9, threshold=0.3)
        expected = dk.sample(model, prompts_of(9), **options).sequences
        assert torch.equal(dk.sample(model, prompts_of(9), compile=True, **options).sequences, expected)


@torch._dynamo.config.patch(disable=True)
def test_where_torch_compiles_nothing():
    """TORCH_COMPILE_DISABLE, read by torch when it is imported."""
    model = fresh_model()
    expected = dk.sample(model, prompts_of(9), max_new_tokens=9).sequences
    with pytest.warns(
        UserWarning, match="Qwen3ForCausalLM is sampled uncompiled: torch.compile is turned off"
    ):
        output = dk.sample(model, prompts_of(9), max_new_tokens=9, compile=True)
    assert torch.equal(output.sequences, expected)


def test_where_compiling_fails(monkeypatch):
    """No C++ compiler, for example."""
    model = fresh_model()

    def backend(graph, _):
        raise RuntimeError("no compiler is to be found")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    expected = dk.sample(model, prompts_of(9), max_new_tokens=9).sequences
    with pytest.warns(UserWarning, match="sampled uncompiled: .*no compiler is to be found"):
        output = dk.sample(model, prompts_of(9), max_new_tokens=9, compile=True)
    assert torch.equal(output.sequences, expected)


def test_where_torch_would_compile_too_often(monkeypatch, request):
    request.addfinalizer(torch._dynamo.reset)  # the code that it gives up is that of every model
    model, mode = fresh_model(), {"now": ""}
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, given, output: output * (0.5 if mode["now"] in "bd" else 1.0)
    )
    warned = pytest.warns(UserWarning, match="Qwen3ForCausalLM is sampled uncompiled: ")
    with torch._dynamo.config.patch(recompile_limit=2), warned:
        for mode["now"] in "abcd":
            output = dk.sample(model, prompts_of(9), max_new_tokens=9, compile=True)
            expected = dk.sample(model, prompts_of(9), max_new_tokens=9)
            assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("layers", [False, True])
def test_the_model_is_left_as_it_was(layers, traced, request):
    if layers:
        request.getfixturevalue("by_layer")
    model = fresh_model()

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dk.sample(model, prompts_of(9), max_new_tokens=13, compile=True, on_round=stop)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation != "dllm"
    dk.sample(model, prompts_of(9), max_new_tokens=13, compile=True)


def test_what_was_compiled_dies_with_the_model(traced):
    model = fresh_model()
    dk.sample(model, prompts_of(9), max_new_tokens=5, compile=True)
    tiny_model.cache_clear()
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None


def test_what_cannot_be_compiled():
    with pytest.raises(ValueError, match="compile=True compiles a transformers model"):
        dk.sample(lambda ids: torch.zeros(*ids.shape, 50), [[1]], mask_id=49, compile=True)
    with pytest.raises(TypeError, match="compile is 1; it must be True or False"):
        dk.SampleConfig(compile=1)
    model = fresh_model()
    model.model.forward = model.model.forward
    with pytest.raises(ValueError, match="compile=True: the forward of Qwen3Model was replaced"):
        dk.sample(model, prompts_of(9), compile=True)
    tiny_model.cache_clear()


def test_layers_that_are_not_to_be_found(monkeypatch):
    """Where no list holds the layers, nothing is compiled instead of something else."""
    model = untrained("llama")
    monkeypatch.setattr(type(model), "device", torch.device("meta"))
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="has no list of 7 layers"):
        compiled._regions(model)
