"""Hugging Face's architectures as rows of a table: which of our settings each has, by which keys, and its names for our
weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megahp.config import ModelConfig
from megahp.errors import UserError

ATTENTION = ("attention.qkv", "attention.out")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
LINEAR = ATTENTION + MLP
NORMS = ("attention_norm", "mlp_norm", "final_norm")
EXPERTS = ("mlp.experts.gate", "mlp.experts.up", "mlp.experts.down")
ALWAYS = ""
UNGATED = ("gelu", "gelu-exact", "relu2")
ACTIVATIONS = {  # theirs -> ours; of two for the same the last is written
    "silu": "swiglu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu-exact",
    "relu2": "relu2",
}
ABSENT: dict[str, Any] = {  # what keys mean that configurations leave out; None: what follows from the others
    **dict.fromkeys(("num_key_value_heads", "head_dim", "n_inner"), None),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), False),
    **dict.fromkeys(("rope_theta", "rotary_emb_base"), 10000.0),
    "layer_norm_epsilon": 1e-5,
}
IDLE = ("preset", "balance_rate", "balance_loss")  # settings of no consequence for logits


@dataclass(frozen=True)
class Family:
    """One architecture. A setting that has neither a key nor values here is what it is where nothing is said of it: its
    default, or what follows from the others.

    Names are those of modules: their weights and, if any, biases are meant; those of experts' weights, with * for their
    numbers, and of routers' biases are whole. Modules that our model has not are passed over. Queries, keys and values
    lie in three matrices "apart", or in one, one after the other "stacked", or "grouped" by heads as ours.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str]  # our setting -> its key
    values: Mapping[str, tuple[Any, ...]]  # our setting -> those it can have; only one where there is no key
    outside: Mapping[str, str]  # our module -> its module
    blocks: str  # where its blocks are
    inside: Mapping[str, str]  # our module in a block -> its modules
    bias: Mapping[str, str] = field(default_factory=dict)  # our module -> the key that gives it a bias, or ALWAYS
    needs: Mapping[str, Any] = field(default_factory=dict)  # values without which it computes something else
    writes: Mapping[str, Any] = field(default_factory=dict)  # values that we give, and others are as good
    absent: Mapping[str, Any] = field(default_factory=dict)  # as ABSENT, where it differs
    qkv: str = "apart"
    transposed: bool = False  # matrices are [inputs, outputs]
    whole_heads: bool = True  # heads must divide the width

    @property
    def bias_keys(self) -> set[str]:
        return set(self.bias.values()) - {ALWAYS}

    @property
    def always_biased(self) -> bool:
        """Whether it has biases where we may have none."""
        return ALWAYS in self.bias.values()

    def biased(self, hf_config: Mapping[str, Any]) -> list[str]:
        """The modules that have biases."""
        return [module for module, key in self.bias.items() if key == ALWAYS or hf_config[key]]


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    keys={
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "mlp_width": "intermediate_size",
        "activation": "hidden_act",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "tied_embeddings": "tie_word_embeddings",
        "vocab_size": "vocab_size",
        "sequence_length": "max_position_embeddings",
    },
    values={"norm": ("rmsnorm",), "positions": ("rope",), "activation": ("swiglu",)},
    outside={"embedding": "model.embed_tokens", "final_norm": "model.norm", "unembedding": "lm_head"},
    blocks="model.layers",
    inside={
        "attention_norm": "input_layernorm",
        "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
    bias={**dict.fromkeys(ATTENTION, "attention_bias"), **dict.fromkeys(MLP, "mlp_bias")},
)
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    bias={},
    needs={"sliding_window": None},
    absent={"sliding_window": 4096},
    whole_heads=False,
)
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    bias={"attention.qkv": ALWAYS},
    needs={"use_sliding_window": False},
)
QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    values={**LLAMA.values, "qk_norm": (True,)},
    bias=dict.fromkeys(ATTENTION, "attention_bias"),
    whole_heads=False,
)
ARCEE = replace(
    LLAMA, model_type="arcee", architecture="ArceeForCausalLM", values={**LLAMA.values, "activation": UNGATED}
)
STARCODER2 = replace(
    ARCEE,
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    keys={**LLAMA.keys, "norm_eps": "norm_epsilon"},
    values={**ARCEE.values, "norm": ("layernorm",)},
    inside={**ARCEE.inside, "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    bias={**dict.fromkeys(LINEAR, "use_bias"), **dict.fromkeys(NORMS, ALWAYS)},
    needs={"sliding_window": None},
    absent={"use_bias": True, "tie_word_embeddings": True},
)
NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    keys={
        **{ours: theirs for ours, theirs in LLAMA.keys.items() if ours not in ("kv_heads", "head_size")},
        "norm_eps": "layer_norm_eps",
        "rope_theta": "rotary_emb_base",
    },
    values=STARCODER2.values,
    outside={"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "unembedding": "embed_out"},
    blocks="gpt_neox.layers",
    inside={
        "attention_norm": "input_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    bias={**dict.fromkeys(ATTENTION, "attention_bias"), **dict.fromkeys(MLP + NORMS, ALWAYS)},
    needs={"use_parallel_residual": False, "rotary_pct": 1.0},
    absent={"use_parallel_residual": True, "rotary_pct": 0.25, "attention_bias": True},
    qkv="grouped",
)
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    keys={
        "layers": "n_layer",
        "width": "n_embd",
        "heads": "n_head",
        "mlp_width": "n_inner",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "tied_embeddings": "tie_word_embeddings",
        "vocab_size": "vocab_size",
        "sequence_length": "n_positions",
    },
    values={"norm": ("layernorm",), "positions": ("learned",), "activation": UNGATED},
    outside={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "unembedding": "lm_head",
    },
    blocks="transformer.h",
    inside={
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    bias=dict.fromkeys(LINEAR + NORMS, ALWAYS),
    needs={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    writes={"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    absent={"tie_word_embeddings": True},
    qkv="stacked",
    transposed=True,
)
MPT = Family(
    "mpt",
    "MptForCausalLM",
    keys={
        "layers": "n_layers",
        "width": "d_model",
        "heads": "n_heads",
        "norm_eps": "layer_norm_epsilon",
        "tied_embeddings": "tie_word_embeddings",
        "vocab_size": "vocab_size",
        "sequence_length": "max_seq_len",
    },
    values={"norm": ("layernorm",), "positions": ("alibi",), "activation": ("gelu-exact",)},
    outside={"embedding": "transformer.wte", "final_norm": "transformer.norm_f", "unembedding": "lm_head"},
    blocks="transformer.blocks",
    inside={
        "attention_norm": "norm_1",
        "attention.qkv": "attn.Wqkv",
        "attention.out": "attn.out_proj",
        "mlp_norm": "norm_2",
        "mlp.up": "ffn.up_proj",
        "mlp.down": "ffn.down_proj",
    },
    needs={
        "no_bias": True,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "softmax_scale": None, "qk_ln": False},
    },
    absent={"tie_word_embeddings": True},
    qkv="stacked",
)
MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys={
        **LLAMA.keys,
        "expert_width": "intermediate_size",
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    values={**LLAMA.values, "router_score": ("softmax",)},
    inside={
        **LLAMA.inside,
        "mlp.router": "block_sparse_moe.gate",
        "mlp.router.bias": "",
        "mlp.experts.gate": "block_sparse_moe.experts.*.w1.weight",
        "mlp.experts.up": "block_sparse_moe.experts.*.w3.weight",
        "mlp.experts.down": "block_sparse_moe.experts.*.w2.weight",
    },
    absent={},
)
QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys={
        **MIXTRAL.keys,
        "mlp_width": "moe_intermediate_size",
        "expert_width": "moe_intermediate_size",
        "experts": "num_experts",
        "router_normalize": "norm_topk_prob",
    },
    values={**QWEN3.values, "router_score": ("softmax",)},
    inside={
        **LLAMA.inside,
        "mlp.router": "mlp.gate",
        "mlp.router.bias": "",
        "mlp.experts.gate": "mlp.experts.*.gate_proj.weight",
        "mlp.experts.up": "mlp.experts.*.up_proj.weight",
        "mlp.experts.down": "mlp.experts.*.down_proj.weight",
    },
    bias={},
    needs={"use_sliding_window": False, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
)
GLM4_MOE = replace(
    QWEN3_MOE,
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys={
        **QWEN3_MOE.keys,
        "mlp_width": "intermediate_size",
        "experts": "n_routed_experts",
        "shared_experts": "n_shared_experts",
        "dense_layers": "first_k_dense_replace",
        "router_scale": "routed_scaling_factor",
        "qk_norm": "use_qk_norm",
    },
    values={**LLAMA.values, "router_score": ("sigmoid",)},
    inside={
        **QWEN3_MOE.inside,
        "mlp.router.bias": "mlp.gate.e_score_correction_bias",
        "mlp.shared.gate": "mlp.shared_experts.gate_proj",
        "mlp.shared.up": "mlp.shared_experts.up_proj",
        "mlp.shared.down": "mlp.shared_experts.down_proj",
    },
    needs={"attention_bias": False, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 1.0},
    writes={"num_nextn_predict_layers": 0},
    absent={"partial_rotary_factor": 0.5},
)
# of those that fit the first is written
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, ARCEE, NEOX, STARCODER2, GPT2, MPT, MIXTRAL, QWEN3_MOE, GLM4_MOE)


def family_of(model: ModelConfig, only: Family | None = None) -> Family:
    """The first family that has the model; only: the one that must. Raises UserError with what the nearest would need:
    one of its positions, if there is any."""
    found = [(_misfits(family, model), family) for family in ((only,) if only else FAMILIES)]
    lacking, family = min(found, key=lambda pair: (model.positions not in pair[1].values["positions"], len(pair[0])))
    if lacking:
        nearest = f"Hugging Face has no architecture of this model; {family.architecture}, the nearest,"
        raise UserError(f"{family.architecture if only else nearest} needs {' and '.join(lacking)}")
    return family


def family_named(model_type: object) -> Family:
    """The family that a config.json names. Raises UserError."""
    known = {family.model_type: family for family in FAMILIES}
    if not isinstance(model_type, str) or model_type not in known:
        raise UserError(f"config.json: model_type = {model_type!r} is not known; there are: {', '.join(known)}")
    return known[model_type]


def has(model: ModelConfig, module: str, layer: int = 0) -> bool:
    """Whether our model has such a module, in this layer if it is one of a block."""
    dense = layer < model.layers - model.expert_layers
    if module == "unembedding":
        return not model.tied_embeddings
    if module == "positions":
        return model.positions == "learned"
    if module in ("attention.query_norm", "attention.key_norm"):
        return model.qk_norm
    if module.endswith(".gate") and model.activation != "swiglu":
        return False
    return not module.startswith("mlp.") or dense == (module in MLP)


def has_bias(model: ModelConfig, module: str) -> bool:
    """Whether a module of ours has a bias where model.bias is true."""
    return module in LINEAR or (module in NORMS and model.norm == "layernorm")


def _misfits(family: Family, model: ModelConfig) -> list[str]:
    """What the family would need of a model to have it."""
    derived = {
        "kv_heads": model.heads,
        "head_size": model.width // model.heads,
        "mlp_width": model.expert_width or 4 * model.width,
    }
    without_a_word = {name: (value,) for name, value in {**vars(ModelConfig()), **derived}.items()}
    anything = {name: (getattr(model, name),) for name in (*IDLE, "bias", *family.keys) if hasattr(model, name)}
    found = [
        f"model.{name} = {' or '.join(map(repr, allowed))}, not {getattr(model, name)!r}"
        for name, allowed in {**without_a_word, **anything, **family.values}.items()
        if getattr(model, name) not in allowed
    ]
    if "experts" in family.keys and not model.experts:
        found.append("model.experts of at least 1, not 0")
    if model.bias and any(has_bias(model, module) and module not in family.bias for module in family.inside):
        found.append("model.bias = False, not True")
    if family.whole_heads and model.width % model.heads:
        found.append(f"model.heads = {model.heads} to divide model.width = {model.width}")
    return found
