"""Reading config.json: old and new spellings, defaults, and refusals."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from petal_swarm.errors import CheckpointError, ModelError, UnsupportedArchitectureError
from petal_swarm.models.bloom import alibi_slopes
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.rope import RotaryTable, angles, interleave_heads, inverse_frequencies, rotate_

ROPES = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-all": {
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
    },
}


def llama(**fields):
    plain = CONFIGS["llama"]().to_dict()
    return {**plain, "architectures": ["LlamaForCausalLM"], **fields}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_match_transformers(name):
    scaling = {"rope_type": name.partition("-")[0], "rope_theta": 5e5, **ROPES[name]}
    theirs = transformers.LlamaConfig(**{**llama(rope_parameters=dict(scaling)), "head_dim": 64})
    expected, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"))
    ours = ModelConfig.from_hf(llama(rope_parameters=scaling, head_dim=64))
    torch.testing.assert_close(inverse_frequencies(ours.rope, 64), expected, rtol=1e-5, atol=1e-9)
    assert ours.rope.amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize("name", ROPES)
def test_old_and_new_spelling_of_rope_agree(name):
    kind = name.partition("-")[0]
    new = llama(rope_parameters={"rope_type": kind, "rope_theta": 2e4, **ROPES[name]})
    old = llama(rope_theta=2e4, rope_scaling={"type": kind, **ROPES[name]})
    del old["rope_parameters"]
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


def test_old_spelling_without_scaling():
    old = llama(rope_theta=3e4, rope_scaling=None)
    del old["rope_parameters"]
    assert ModelConfig.from_hf(old).rope.theta == 3e4


def test_dtype_has_two_spellings():
    assert ModelConfig.from_hf(llama(dtype=None, torch_dtype="torch.float16")).torch_dtype == "float16"
    assert ModelConfig.from_hf(llama(dtype="bfloat16")).torch_dtype == "bfloat16"


def test_windows():
    def windows(name, **fields):
        config = ModelConfig.from_hf({**CONFIGS[name]().to_dict(), **fields})
        return [config.window(block) for block in range(config.num_blocks)]

    mistral = {"architectures": ["MistralForCausalLM"]}
    qwen2 = {"architectures": ["Qwen2ForCausalLM"]}
    assert windows("mistral-window", **mistral) == [9, 9, 9]
    assert windows("mistral-window", **mistral, sliding_window=None) == [None] * 3
    assert windows("qwen2-window", **qwen2) == [None, 7, 7]
    assert windows("qwen2-window", **qwen2, layer_types=None) == [None, 7, 7]
    assert windows("qwen2-window", **qwen2, use_sliding_window=False) == [None] * 3


def test_unsupported_architecture_lists_those_that_are():
    with pytest.raises(UnsupportedArchitectureError, match=r"GPT2LMHeadModel.*BloomForCausalLM.*Qwen3"):
        ModelConfig.from_hf({"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(UnsupportedArchitectureError, match="model_type 'gpt2'"):
        ModelConfig.from_hf({"model_type": "gpt2"})


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "longrope"}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
)
def test_what_would_compute_something_else_is_refused(fields):
    with pytest.raises(UnsupportedArchitectureError):
        ModelConfig.from_hf(llama(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": None},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_hidden_layers": 2.5},
        {"head_dim": 15},
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        {"rope_parameters": {"rope_type": "llama3"}},
        {"rms_norm_eps": "small"},
        {"num_hidden_layers": 1 << 30},
    ],
)
def test_impossible_fields(fields):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used"):
        ModelConfig.from_hf(llama(**fields))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), value=JSON)
def test_configurations_from_strangers_never_surprise(data, value):
    kind = data.draw(st.sampled_from(["llama3-biases", "mistral-window", "qwen2-window", "bloom"]))
    config = MUTATED[kind]
    field = data.draw(st.sampled_from(sorted(config)))
    with contextlib.suppress(ModelError):
        ModelConfig.from_hf({**config, field: value})


MUTATED = {
    name: {**CONFIGS[name]().to_dict(), "architectures": [architecture]}
    for name, architecture in {
        "llama3-biases": "LlamaForCausalLM",
        "mistral-window": "MistralForCausalLM",
        "qwen2-window": "Qwen2ForCausalLM",
        "bloom": "BloomForCausalLM",
    }.items()
}


def test_mathematics_leaves_out_what_computes_nothing():
    config = ModelConfig.from_hf(llama())
    same = dataclasses.replace(config, torch_dtype="float16", max_positions=7, architecture="Other")
    other = dataclasses.replace(config, norm_eps=1e-3)
    assert config.key(b"") == same.key(b"")
    nearly = dataclasses.replace(config, norm_eps=config.norm_eps * (1 + 1e-15))
    assert nearly.key(b"") == config.key(b""), "logarithms differ in their last bits between platforms"
    assert len({config.key(b""), other.key(b""), config.key(b"x")}) == 3


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 112])
def test_slopes_match_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    config = ModelConfig.from_hf(
        {
            "architectures": ["BloomForCausalLM"],
            "n_layer": 1,
            "hidden_size": heads,
            "n_head": heads,
            "vocab_size": 3,
        }
    )
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(config), theirs)


def test_rotations_do_not_depend_on_how_the_table_grew():
    rope = ModelConfig.from_hf(llama()).rope
    grown, at_once = (RotaryTable(rope, 16, torch.device("cpu")) for _ in range(2))
    for position in (0, 3, 700, 1400):
        grown.run(position, position + 1)
    assert torch.equal(grown.run(0, 1401), at_once.run(0, 1401))
    positions = torch.tensor([5, 1200, 0])
    assert torch.equal(grown.rows(positions, 1201)[1], at_once.run(1200, 1201)[0])


def test_interleaved_rotation_is_the_half_split_one():
    """The formula of the paper on half-split heads, and `rotate_` on interleaved ones, give equal scores."""
    rope = ModelConfig.from_hf(llama()).rope
    heads = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(0))
    angle = angles(rope, 16, 0, 9).repeat(1, 2)[:, None]
    first, second = heads.chunk(2, dim=-1)
    expected = heads * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()
    mine = interleave_heads(heads.movedim(-1, 0).reshape(16, -1), 16).reshape(16, 9, 2).movedim(0, -1)
    mine = mine.contiguous()
    rotate_(mine, RotaryTable(rope, 16, torch.device("cpu")).run(0, 9))
    torch.testing.assert_close(mine @ mine.mT, expected @ expected.mT)
