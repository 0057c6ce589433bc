"""Peers of the benchmarks: stand-in checkouts and programs, and the GGUF file that llama.cpp reads."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import dllm_kernels as dk
from benchmarks import completions, llada_shaped, peers
from benchmarks.peers import Peer
from benchmarks.peers.process import PeerProcess
from benchmarks.test_peers import CASES

ROOT = Path(__file__).parents[1]
LAYERS, HIDDEN, VOCABULARY = 2, 64, 96
MASK_ID, BLOCK = VOCABULARY - 1, 4
PROMPT = [5, 17, 3, 40]


@pytest.fixture(scope="module")
def model():
    return llada_shaped.random_model(LAYERS, HIDDEN, VOCABULARY)


def checkout(folder: Path, source: str) -> Path:
    """A folder with a generate.py, as LLaDA's has one."""
    folder.mkdir(exist_ok=True)
    (folder / "generate.py").write_text(textwrap.dedent(source))
    return folder


# One token per step from left to right, whatever the confidence; it prints as checkouts do.
LEFT_TO_RIGHT = """
    import torch

    def generate(model, prompt, steps, gen_length, block_length, mask_id):
        print("generating", steps, block_length)
        masks = torch.full((1, gen_length), mask_id)
        canvas = torch.cat([prompt, masks], dim=1)
        with torch.no_grad():
            for position in range(prompt.shape[1], canvas.shape[1]):
                logits = model(canvas).logits
                logits[..., mask_id] = -torch.inf
                canvas[:, position] = logits[:, position].argmax(dim=-1)
        return canvas
"""


# ---- naming them -----------------------------------------------------------------------------------------
def test_a_checkout_is_run_by_this_interpreter_unless_another_is_named(tmp_path):
    (plain,) = peers.named([f"llada={tmp_path}"]).values()
    assert plain == Peer("llada", tmp_path, sys.executable)
    (other,) = peers.named([f"dllm={tmp_path}"], ["dllm=/bin/sh"]).values()
    assert other.python == "/bin/sh"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--peer", "dllm"], "--peer dllm: it must be NAME=DIR"),
        (["--peer", "other=/tmp"], "'other' is not known; known: llada, fast-dllm, dllm, llama.cpp"),
        (["--peer", "dllm=/no/folder"], "--peer dllm=/no/folder: there is no such folder"),
        (["--peer", "llama.cpp=/tmp"], "it must be the program llama-diffusion-cli"),
        (["--peer-python", "dllm=/bin/sh"], "no --peer dllm=DIR is given"),
        (["--peer", "dllm=/tmp", "--peer-python", "dllm=/no/python"], "there is no such program"),
        (["--peer", "llama.cpp=/bin/sh", "--peer-python", "llama.cpp=/bin/sh"], "needs no interpreter"),
    ],
)
def test_peers_that_cannot_be_run_are_refused_by_name(options, message):
    given = {"--peer": [], "--peer-python": []}
    for option, value in zip(options[::2], options[1::2], strict=True):
        given[option].append(value)
    with pytest.raises(ValueError, match="(?s).*" + message.replace(".", r"\.")):
        peers.named(given["--peer"], given["--peer-python"])


# ---- a checkout in its own process -----------------------------------------------------------------------
def test_a_checkout_samples_our_weights(tmp_path, model):
    peer = Peer("llada", checkout(tmp_path / "LLaDA", LEFT_TO_RIGHT))
    with PeerProcess(peer, model, "bidirectional") as process:
        theirs = process.sample("generate", PROMPT, 2 * BLOCK, BLOCK, MASK_ID)
    ids = torch.tensor([PROMPT + [MASK_ID] * 2 * BLOCK])
    with torch.no_grad():
        for position in range(len(PROMPT), ids.shape[1]):
            logits = model(input_ids=ids, use_cache=False).logits[0, position]
            logits[MASK_ID] = -torch.inf
            ids[0, position] = logits.argmax()
    assert theirs.tolist() == ids.tolist()


def test_a_checkout_sees_nothing_of_ours(tmp_path, model, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "somewhere"))
    source = """
        import os, sys

        def generate(model, prompt, **options):
            assert "PYTHONPATH" not in os.environ
            assert not {"dllm_kernels", "benchmarks"} & set(sys.modules)
            assert os.environ["OMP_WAIT_POLICY"] == "passive"
            return prompt
    """
    with PeerProcess(Peer("llada", checkout(tmp_path / "LLaDA", source)), model, "bidirectional") as process:
        assert process.sample("generate", PROMPT, BLOCK, BLOCK, MASK_ID).tolist() == [PROMPT]


def test_an_error_of_a_checkout_names_it_and_what_it_said(tmp_path, model):
    failing = "def generate(*_, **__):\n    print('on its way')\n    raise KeyError('their bug')\n"
    peer = Peer("llada", checkout(tmp_path / "LLaDA", failing))
    said = r"(?s)LLaDA \(.*KeyError: 'their bug'.*on its way"
    with PeerProcess(peer, model, "bidirectional") as process, pytest.raises(RuntimeError, match=said):
        process.sample("generate", PROMPT, BLOCK, BLOCK, MASK_ID)


def test_a_checkout_that_cannot_be_imported_is_named(tmp_path, model):
    peer = Peer("llada", checkout(tmp_path / "LLaDA", "import a_module_that_is_missing"))
    with pytest.raises(
        RuntimeError, match=r"(?s)LLaDA \(.*load: ModuleNotFoundError.*a_module_that_is_missing"
    ):
        PeerProcess(peer, model, "bidirectional")


def test_a_checkout_that_ends_is_named(tmp_path, model):
    peer = Peer("llada", checkout(tmp_path / "LLaDA", "import os\nos._exit(7)"))
    with pytest.raises(RuntimeError, match=r"(?s)LLaDA \(.*it ended with status 7"):
        PeerProcess(peer, model, "bidirectional")


def test_the_benchmark_compares_with_a_checkout_and_demands_its_tokens(tmp_path):
    """The whole way, from --peer on: a checkout of other tokens fails, and nothing is reported."""
    folder = checkout(tmp_path / "LLaDA", LEFT_TO_RIGHT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_peers.py"]
    ended = subprocess.run(
        [*command, "--smoke", "--peer", f"llada={folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert "LLaDA, generate: Tensor-likes are not equal" in ended.stdout
    assert f"1 failed, {len(CASES) - 1} skipped" in ended.stdout
    assert "Fast-dLLM is run where --peer fast-dllm=DIR names it" not in ended.stdout  # without -rs


# ---- counting --------------------------------------------------------------------------------------------
def test_tokens_are_counted_up_to_the_end_token():
    end = 9
    ids = torch.tensor([[1, end, 4, 5, end, 6], [1, 2, 3, 4, 5, 6]])
    assert completions.tokens_to_end(ids, 2, end) == 2 + 4


# ---- GGUF ------------------------------------------------------------------------------------------------
gguf = pytest.importorskip("gguf")
from benchmarks.peers import gguf_file, llama_cpp  # noqa: E402

THEIR_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
}


def their_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{THEIR_NAMES[rest]}.weight"
    return f"{THEIR_NAMES[name]}.weight"


@pytest.fixture(scope="module")
def grouped():
    """Two query heads for each key and value head would be read wrongly if the heads were mixed up."""
    from transformers import LlamaForCausalLM

    config = llada_shaped.random_model(LAYERS, 2 * HIDDEN, VOCABULARY).config
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 32
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=gguf_file.KINDS)
def kind_and_tensors(request, grouped, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_file.write(grouped, path, request.param)
    reader = gguf.GGUFReader(path)
    values = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    return request.param, reader, values, types


def test_a_gguf_file_has_the_tensors_of_llamacpps_llada(kind_and_tensors, grouped):
    kind, _, values, types = kind_and_tensors
    expected = {their_name(name): weight for name, weight in grouped.state_dict().items()}
    assert {name: value.shape for name, value in values.items()} == {
        name: weight.shape for name, weight in expected.items()
    }
    for name, stored in types.items():
        wanted = "F32" if values[name].dim() == 1 else {"float32": "F32"}.get(kind, kind.upper())
        assert stored.name == wanted, name


# The largest error as a share of a block's largest value: half a step of 127, a step of 8 (whose last one is
# cut off on one side), and the rounding of the block's scale to float16.
ERRORS = {"float32": 0, "q8_0": 1 / 127 / 2 + 2**-11, "q4_0": 1 / 8 + 2**-11}


def test_a_gguf_file_has_our_values(kind_and_tensors, grouped):
    kind, _, values, _ = kind_and_tensors
    for name, weight in grouped.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            continue
        stored, blocks = values[their_name(name)], weight.reshape(-1, 32)
        error = (stored.reshape(-1, 32) - blocks).abs()
        allowed = blocks.abs().amax(dim=1, keepdim=True) * ERRORS[kind]
        assert (error <= (0 if weight.dim() == 1 else allowed)).all(), name


def rotated_halves(x, angles):
    """transformers' rotation: feature i pairs with i + D/2. x [H, S, D], angles [S, D/2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotated_neighbours(x, angles):
    """llama.cpp's "normal" rotation: feature 2i pairs with 2i + 1."""
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


def test_queries_and_keys_meet_under_their_rotation_as_under_ours(kind_and_tensors, grouped):
    """Scores of attention, in float64, from stored projections and from ours."""
    kind, _, values, _ = kind_and_tensors
    config, attention = grouped.config, grouped.model.layers[0].self_attn
    hidden = torch.randn(6, config.hidden_size, dtype=torch.float64)
    angles = torch.arange(6.0)[:, None] * 1e4 ** (-torch.arange(16.0) / 16)

    def scores(query, key, rotate):
        q, k = (
            rotate((hidden @ w.double().T).view(6, -1, config.head_dim).transpose(0, 1), angles.double())
            for w in (query, key)
        )
        return q @ k.repeat_interleave(2, dim=0).transpose(1, 2)

    ours = scores(attention.q_proj.weight, attention.k_proj.weight, rotated_halves)
    theirs = scores(values["blk.0.attn_q.weight"], values["blk.0.attn_k.weight"], rotated_neighbours)
    error = (theirs - ours).abs().max() / ours.abs().max()
    assert error < {"float32": 1e-6, "q8_0": 0.02, "q4_0": 0.2}[kind]


def test_a_gguf_file_says_what_llamacpp_asks_for(kind_and_tensors, grouped):
    _, reader, _, _ = kind_and_tensors
    said = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llada",
        "llada.block_count": LAYERS,
        "llada.embedding_length": 2 * HIDDEN,
        "llada.feed_forward_length": 6 * HIDDEN,
        "llada.attention.head_count": 4,
        "llada.attention.head_count_kv": 2,
        "llada.rope.dimension_count": 32,
        "llada.rope.freq_base": 10_000.0,
        "llada.vocab_size": VOCABULARY,
        "llada.attention.causal": False,
        "diffusion.shift_logits": False,
        "tokenizer.ggml.mask_token_id": MASK_ID,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: said.get(name) for name in expected} == expected
    assert said["llada.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "".join(said["tokenizer.ggml.tokens"][token] for token in PROMPT) == gguf_file.text_of(PROMPT)


# ---- llama.cpp's program ---------------------------------------------------------------------------------
STAND_IN = """
    #!{python}
    import re, sys
    import gguf
    option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    architecture = gguf.GGUFReader(option["-m"]).fields["general.architecture"].contents()
    assert architecture == "llada"
    prompt = re.findall(r"<([0-9]+)>", option["-p"])
    canvas = int(option["-ub"])
    assert option["-c"] == option["-b"] == option["-ub"] and option["-t"] == option["-tb"]
    print("diffusion step: 0/" + option["--diffusion-steps"])
    print("total time: 100.0ms, time per step: 12.50ms, sampling time per step: 0.10ms", file=sys.stderr)
    print("".join(f"<{{prompt[0]}}>" for _ in range(canvas - len(prompt))), file=sys.stderr)
"""


def program(path: Path, source: str) -> Peer:
    path.write_text(textwrap.dedent(source).strip().format(python=sys.executable) + "\n")
    path.chmod(0o755)
    return peers.named([f"llama.cpp={path}"])["llama.cpp"]


def test_the_programs_time_and_tokens_are_read(tmp_path, model):
    gguf_file.write(model, tmp_path / "model.gguf", "float32")
    peer = program(tmp_path / "llama-diffusion-cli", STAND_IN)
    run = llama_cpp.run(peer, tmp_path / "model.gguf", PROMPT, canvas=8, steps=8)
    assert run == llama_cpp.Run(0.0125, [PROMPT[0]] * 4)


@pytest.mark.parametrize(
    "source, message",
    [
        ("#!/bin/sh\necho no such model\nexit 3", r"status 3\nno such model"),
        ("#!/bin/sh\necho done", r"it printed no time per step and completion\ndone"),
    ],
)
def test_a_program_that_fails_is_named_with_what_it_said(tmp_path, source, message):
    peer = program(tmp_path / "llama-diffusion-cli", source)
    with pytest.raises(RuntimeError, match=rf"llama.cpp \(.*llama-diffusion-cli\): {message}"):
        llama_cpp.run(peer, tmp_path / "model.gguf", PROMPT, canvas=8, steps=8)


def test_other_tokens_of_the_program_are_refused_but_for_the_mask():
    from benchmarks.test_llama_cpp import assert_same_tokens

    assert_same_tokens([4, 5, 6], [4, MASK_ID, 6], MASK_ID)
    with pytest.raises(AssertionError, match=r"\(5, 7\)"):
        assert_same_tokens([4, 5, 6], [4, 7, 6], MASK_ID)
    with pytest.raises(AssertionError, match="gave 2 tokens, not 3"):
        assert_same_tokens([4, 5, 6], [4, 5], MASK_ID)


def test_the_random_model_depends_on_positions(model):
    """Equal tokens would prove nothing where every position predicts the same."""
    options = dict(max_new_tokens=16, steps=1, block_size=16, stop_on_eos=False, cache="none")
    output = dk.sample(model, [PROMPT], **options)
    assert len(set(output.sequences[0, len(PROMPT) :].tolist())) > 1
