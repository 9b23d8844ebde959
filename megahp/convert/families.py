"""A table of Hugging Face architectures: for each, its config.json key of each of our settings and its names for our
weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megahp.config import Config, ModelConfig, ParameterizationConfig
from megahp.errors import UserError
from megahp.model.mlp import XIELU_BETA
from megahp.scaling.parameterization import Table, fill_in, table_of

ATTENTION = ("attention.qkv", "attention.out")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
LINEAR = ATTENTION + MLP
NORMS = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", "final_norm")
ALPHAS = ("mlp.alpha_p", "mlp.alpha_n")  # of xIELU
EXPERTS = ("mlp.experts.gate", "mlp.experts.up", "mlp.experts.down")
ALWAYS = ""
UNGATED = ("gelu", "gelu-exact", "relu2")
ACTIVATIONS = {  # Hugging Face name -> ours; where two mean the same, export writes the last
    "silu": "swiglu",
    "gelu_fast": "gelu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu-exact",
    "relu2": "relu2",
    "xielu": "xielu",
}
GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}  # the same, where the MLP has a gate
DEFAULTS: dict[str, Any] = {  # of keys that a config.json may omit; None: derived from other settings
    **dict.fromkeys(("num_key_value_heads", "head_dim", "n_inner"), None),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), False),
    **dict.fromkeys(("rope_theta", "rotary_emb_base"), 10000.0),
    "partial_rotary_factor": 1.0,
    "layer_norm_epsilon": 1e-5,
}
# of every family: with another value the model, or its weights, are something else; a tuple holds the possible values
REQUIRED: dict[str, Any] = {
    "quantization_config": None,
    "pruned_heads": (None, {}),
    "layer_types": (None, ["full_attention"]),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "rope_interleaved"), False),
}
IRRELEVANT = {  # why a key of config.json does not change the logits -> such keys; keys in no list are refused
    "where the file comes from": "architectures auto_map internal_version is_llama_config model_type tokenizer_class "
    "tokenizer_name transformers_version unsloth_version _name_or_path _commit_hash",
    "tokens, which the tokenizer's files are kept for": "bos_token_id eos_token_id pad_token_id unk_token_id "
    "sep_token_id decoder_start_token_id",
    "training: dropout, initial weights, losses": "attention_dropout attention_probs_dropout_prob attn_pdrop "
    "classifier_dropout emb_pdrop embd_pdrop embedding_dropout embedding_fraction hidden_dropout "
    "hidden_dropout_prob init_config init_device init_std initializer_range output_router_logits resid_pdrop "
    "residual_dropout router_aux_loss_coef router_jitter_noise selective_checkpoint_enabled "
    "sequence_parallel_enabled",
    "how something is computed, not what": "dtype torch_dtype torchscript use_bfloat16 use_cache use_flash_attention "
    "use_kernels attn_implementation _attn_implementation _attn_implementation_autoset pretraining_tp "
    "reorder_and_upcast_attn attention_softmax_in_fp32 scale_attention_softmax_in_fp32 chunk_size_feed_forward verbose",
    "what is returned": "output_attentions output_hidden_states return_dict return_dict_in_generate output_scores",
    "how text is generated": "do_sample early_stopping length_penalty max_length max_new_tokens min_length min_p "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences repetition_penalty task_specific_params "
    "temperature top_k top_p typical_p bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values diversity_penalty encoder_no_repeat_ngram_size prefix",
    "other heads": "id2label label2id num_labels _num_labels problem_type finetuning_task is_decoder "
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    "cross_attention_hidden_size",
    "lengths that are not enforced": "n_ctx max_sequence_length",
}
ROPE_KEYS = {  # how wavelengths are stretched -> our settings and their keys in the table of that
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_original_length": "original_max_position_embeddings",
        "rope_slow": "low_freq_factor",
        "rope_fast": "high_freq_factor",
    },
    "yarn": {
        "rope_factor": "factor",
        "rope_original_length": "original_max_position_embeddings",
        "rope_slow": "beta_slow",
        "rope_fast": "beta_fast",
        "rope_magnitude": "attention_factor",
    },
}
# settings that do not change logits; and quantization, which whoever reads the weights repeats (docs/compute.md)
WITHOUT_EFFECT = ("preset", "balance_rate", "balance_loss", "padding", "quantize", "quantize_group")


@dataclass(frozen=True)
class Family:
    """One architecture. A setting with neither a key nor values has its default, or what derives from other settings.

    Names are those of modules and stand for weight and bias. Names of experts' weights, with * for the expert's index,
    and of the router's bias are full names of tensors. Modules that our model does not have are skipped.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str]  # our setting -> its key
    values: Mapping[str, tuple[Any, ...]]  # our setting -> its possible values; a single one where there is no key
    top_level: Mapping[str, str]  # our module -> its module
    block_prefix: str
    per_block: Mapping[str, str]  # our module in a block -> its modules, space-separated
    bias: Mapping[str, str] = field(default_factory=dict)  # our module -> the key that gives it a bias, or ALWAYS
    required: Mapping[str, Any] = field(default_factory=dict)  # adds to REQUIRED; the first of a tuple is written
    extra: Mapping[str, Any] = field(default_factory=dict)  # written on export; other values are accepted
    irrelevant: str = ""  # further keys that do not change the logits
    defaults: Mapping[str, Any] = field(default_factory=dict)  # overrides DEFAULTS; transformers' own where they differ
    # three matrices ("separate"), or one: all queries, then keys, then values ("stacked"), or by KV head ("grouped")
    qkv: str = "separate"
    constants: Mapping[str, float] = field(default_factory=dict)  # tensors of a block that have this value
    activations: Mapping[str, str] = field(default_factory=lambda: ACTIVATIONS)  # its names -> ours
    joined: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # module -> the two whose rows it holds
    transposed: bool = False  # matrices are [inputs, outputs]
    norm_offset: float = 0.0  # what norms add to their weights
    period: int = 0  # default of full_attention_every, where layers have types of attention; 0 = they have none
    local_theta: bool = False  # the two types of attention have rotary wavelengths of their own
    # key -> the multiplier of a parameterization's table whose power it holds, and which power
    multipliers: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    scaled_embedding: bool = False  # the embedding's output is multiplied by sqrt(width)
    heads_divide_width: bool = True

    @property
    def bias_keys(self) -> set[str]:
        return set(self.bias.values()) - {ALWAYS}

    def biased(self, hf_config: Mapping[str, Any]) -> list[str]:
        """Return the modules that have biases."""
        return [module for module, key in self.bias.items() if key == ALWAYS or hf_config[key]]

    @property
    def free(self) -> set[str]:
        """Return the settings that can have any value."""
        free = {*WITHOUT_EFFECT, "bias", *self.keys}
        if [module for module, key in self.bias.items() if key == self.bias.get("attention.qkv")] == ["attention.qkv"]:
            free.add("qkv_bias")
        if self.values["positions"] == ("rope",) and "rope_scaling" not in self.values:
            free |= {"rope_scaling", *(setting for keys in ROPE_KEYS.values() for setting in keys)}
        if self.period:
            free |= {"window", "full_attention_every"}
        return free | {"window_rope_theta"} if self.local_theta else free

    def kept_multipliers(self, table: Table, model: ModelConfig) -> tuple[Table, dict[str, float]]:
        """Return a table of the multipliers that the architecture has itself, of those of the model's, and the values
        of their keys."""
        keys = {key: getattr(table, name) ** power for key, (name, power) in self.multipliers.items()}
        for key, (_, power) in self.multipliers.items():
            keys[key] = round(keys[key]) if power == -2 else keys[key]  # transformers takes only a whole number
        return self.own_table(keys, model), keys

    def own_table(self, hf_config: Mapping[str, Any], model: ModelConfig) -> Table:
        """Return a table of the multipliers that the architecture has itself; for those without a key it has SP's."""
        plain = fill_in(ParameterizationConfig(name="sp"), model.width, model.layers, model.head_size)
        own = {name: hf_config[key] ** (1 / power) for key, (name, power) in self.multipliers.items()}
        return replace(plain, **{"embedding": model.width**0.5 if self.scaled_embedding else 1.0, **own})


def _without(table: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in names}


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
    values={"norm": ("rmsnorm",), "positions": ("rope",), "activation": ("swiglu", "geglu")},
    top_level={"embedding": "model.embed_tokens", "final_norm": "model.norm", "unembedding": "lm_head"},
    block_prefix="model.layers",
    per_block={
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
    activations=GATED,
)
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys={**LLAMA.keys, "window": "sliding_window"},
    bias={},
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    heads_divide_width=False,
)
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    bias={"attention.qkv": ALWAYS},
    required={"use_sliding_window": False, "use_mrope": False},
    irrelevant="sliding_window max_window_layers",  # without use_sliding_window
    defaults={"num_key_value_heads": 32},
)
QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    values={**LLAMA.values, "qk_norm": (True,)},
    bias=dict.fromkeys(ATTENTION, "attention_bias"),
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    heads_divide_width=False,
)
ARCEE = replace(
    LLAMA,
    model_type="arcee",
    architecture="ArceeForCausalLM",
    values={**LLAMA.values, "activation": UNGATED},
    activations=ACTIVATIONS,
)
STARCODER2 = replace(
    ARCEE,
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    keys={**MISTRAL.keys, "norm_eps": "norm_epsilon"},
    values={**ARCEE.values, "norm": ("layernorm",)},
    per_block={**ARCEE.per_block, "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    bias={**dict.fromkeys(LINEAR, "use_bias"), **dict.fromkeys(NORMS, ALWAYS)},
    required={"scale_attn_weights": True, "mlp_type": "default", "norm_type": "layer_norm"},
    irrelevant="activation_function",  # hidden_act decides
    defaults={"use_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 2},
)
NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    keys={
        **_without(LLAMA.keys, "kv_heads", "head_size"),
        "norm_eps": "layer_norm_eps",
        "rope_theta": "rotary_emb_base",
        "rope_fraction": "rotary_pct",
        "parallel_residual": "use_parallel_residual",
    },
    values=STARCODER2.values,
    top_level={"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "unembedding": "embed_out"},
    block_prefix="gpt_neox.layers",
    per_block={
        "attention_norm": "input_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    bias={**dict.fromkeys(ATTENTION, "attention_bias"), **dict.fromkeys(MLP + NORMS, ALWAYS)},
    defaults={"use_parallel_residual": True, "rotary_pct": 0.25, "attention_bias": True},
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
    top_level={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "unembedding": "lm_head",
    },
    block_prefix="transformer.h",
    per_block={
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    bias=dict.fromkeys(LINEAR + NORMS, ALWAYS),
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    # transformers' default is 0.1, with which the model would train differently
    extra={"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    defaults={"tie_word_embeddings": True},
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
    top_level={"embedding": "transformer.wte", "final_norm": "transformer.norm_f", "unembedding": "lm_head"},
    block_prefix="transformer.blocks",
    per_block={
        "attention_norm": "norm_1",
        "attention.qkv": "attn.Wqkv",
        "attention.out": "attn.out_proj",
        "mlp_norm": "norm_2",
        "mlp.up": "ffn.up_proj",
        "mlp.down": "ffn.down_proj",
    },
    required={
        "no_bias": True,
        "logit_scale": None,
        "norm_type": "low_precision_layernorm",
        "expansion_ratio": 4,
        "attn_config": {
            **{"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "softmax_scale": None, "qk_ln": False},
            **{"attn_type": "multihead_attention", "prefix_lm": False, "attn_uses_sequence_id": False},
        },
    },
    irrelevant="learned_pos_emb attn_impl",  # there is ALiBi
    defaults={"tie_word_embeddings": True},
    qkv="stacked",
)
MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys={
        **MISTRAL.keys,
        "expert_width": "intermediate_size",
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    values={**LLAMA.values, "router_score": ("softmax",)},
    per_block={
        **LLAMA.per_block,
        "mlp.router": "block_sparse_moe.gate",
        "mlp.router.bias": "",  # has none: ours must be 0
        "mlp.experts.gate": "block_sparse_moe.experts.*.w1.weight",
        "mlp.experts.up": "block_sparse_moe.experts.*.w3.weight",
        "mlp.experts.down": "block_sparse_moe.experts.*.w2.weight",
    },
    required={"moe_frequency": 1},
    defaults={"rope_theta": 1e6, "num_key_value_heads": 8, "sliding_window": None},
)
QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys={
        **_without(MIXTRAL.keys, "window"),
        "mlp_width": "moe_intermediate_size",
        "expert_width": "moe_intermediate_size",
        "experts": "num_experts",
        "router_normalize": "norm_topk_prob",
    },
    values={**QWEN3.values, "router_score": ("softmax",)},
    per_block={
        **LLAMA.per_block,
        "mlp.router": "mlp.gate",
        "mlp.router.bias": "",  # has none: ours must be 0
        "mlp.experts.gate": "mlp.experts.*.gate_proj.weight",
        "mlp.experts.up": "mlp.experts.*.up_proj.weight",
        "mlp.experts.down": "mlp.experts.*.down_proj.weight",
    },
    bias={},
    required={
        **{"use_sliding_window": False, "attention_bias": False, "decoder_sparse_step": 1},
        "mlp_only_layers": ([], None),
    },
    irrelevant=f"{QWEN3.irrelevant} intermediate_size",  # of blocks without experts
    defaults={"num_key_value_heads": 4},
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
        "rope_fraction": "partial_rotary_factor",
    },
    values={**LLAMA.values, "router_score": ("sigmoid",)},
    per_block={
        **QWEN3_MOE.per_block,
        "mlp.router.bias": "mlp.gate.e_score_correction_bias",
        "mlp.shared.gate": "mlp.shared_experts.gate_proj",
        "mlp.shared.up": "mlp.shared_experts.up_proj",
        "mlp.shared.down": "mlp.shared_experts.down_proj",
    },
    bias={"attention.qkv": "attention_bias"},
    required={"n_group": 1, "topk_group": 1},
    extra={"num_nextn_predict_layers": 0},  # our model has no layer that predicts further tokens
    irrelevant="",
    defaults={"partial_rotary_factor": 0.5, "num_key_value_heads": 8},
)
PHI3 = replace(
    MISTRAL,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    keys={**_without(MISTRAL.keys, "head_size"), "rope_fraction": "partial_rotary_factor"},
    values={**LLAMA.values, "rope_scaling": ("none",)},  # its further kind, longrope, depends on the text's length
    per_block={**LLAMA.per_block, "attention.qkv": "self_attn.qkv_proj"},
    required={"attention_bias": False},
    irrelevant="original_max_position_embeddings",  # for longrope
    defaults={"sliding_window": None},
    qkv="stacked",
    joined={"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    heads_divide_width=True,
)
GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    keys=_without(LLAMA.keys, "head_size"),
    multipliers={
        "embedding_multiplier": ("embedding", 1),
        "residual_multiplier": ("residual", 1),
        "attention_multiplier": ("attention", 1),
        "logits_scaling": ("logits", -1),
    },
    defaults=dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0
    ),
)
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys={**GRANITE.keys, "no_rope_every": "no_rope_layer_interval"},
    required={"use_sliding_window": False},
    irrelevant="no_rope_layers sliding_window max_window_layers",  # the first is read beside no_rope_layer_interval
    defaults={
        **{"rope_theta": 2e6, "no_rope_layer_interval": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    },
)
NEMOTRON = replace(
    ARCEE,
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    keys={**LLAMA.keys, "norm_eps": "norm_eps", "rope_fraction": "partial_rotary_factor"},
    values={**ARCEE.values, "norm": ("layernorm",)},
    bias={**LLAMA.bias, **dict.fromkeys(NORMS, ALWAYS)},
    defaults={"partial_rotary_factor": 0.5},
    norm_offset=1.0,
    heads_divide_width=False,
)
OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    keys=GRANITE.keys,
    values={**LLAMA.values, "norm_placement": ("post",), "qk_norm": (True,), "qk_norm_whole": (True,)},
    per_block={
        **_without(LLAMA.per_block, *NORMS),
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    bias=dict.fromkeys(ATTENTION, "attention_bias"),
)
OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    keys={**OLMO2.keys, "window": "sliding_window"},
    required={"layer_types": (None, ["full_attention", "sliding_attention"])},
    defaults={"sliding_window": 4096, "rope_theta": 5e5},
    period=4,
    local_theta=True,
)
GEMMA = replace(
    LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    required={"use_bidirectional_attention": (None, False)},
    irrelevant="hidden_activation",
    bias=dict.fromkeys(ATTENTION, "attention_bias"),
    defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    heads_divide_width=False,
    activations={"gelu": "geglu", **GATED},  # the first Gemma's files say gelu and mean its tanh approximation
    norm_offset=1.0,
    scaled_embedding=True,
)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys={
        **{**LLAMA.keys, "activation": "hidden_activation", "window": "sliding_window"},
        **{"attention_softcap": "attn_logit_softcapping", "logits_softcap": "final_logit_softcapping"},
    },
    values={**LLAMA.values, "norm_placement": ("both",)},
    per_block={
        **LLAMA.per_block,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    required={**GEMMA.required, "layer_types": (None, ["full_attention", "sliding_attention"])},
    irrelevant="hidden_act cache_implementation",
    defaults={
        **{"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256},
        **{"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        "hidden_activation": "gelu_pytorch_tanh",
    },
    heads_divide_width=True,
    period=2,
    multipliers={"query_pre_attn_scalar": ("attention", -2)},
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=_without(GEMMA2.keys, "attention_softcap", "logits_softcap"),
    values={**GEMMA2.values, "qk_norm": (True,)},
    required={**GEMMA2.required, **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"))},
    defaults={
        **_without(GEMMA2.defaults, "attn_logit_softcapping", "final_logit_softcapping"),
        **{"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    },
    period=6,
    local_theta=True,
)
APERTUS = replace(
    ARCEE,
    model_type="apertus",
    architecture="ApertusForCausalLM",
    keys=GRANITE.keys,
    values={**LLAMA.values, "activation": ("xielu",), "qk_norm": (True,)},
    per_block={
        **LLAMA.per_block,
        "attention_norm": "attention_layernorm",
        "mlp_norm": "feedforward_layernorm",
        "mlp.alpha_p": "mlp.act_fn.alpha_p",
        "mlp.alpha_n": "mlp.act_fn.alpha_n",
    },
    constants={"mlp.act_fn.beta": XIELU_BETA, "mlp.act_fn.eps": -1e-6},
    bias=dict.fromkeys(ATTENTION, "attention_bias"),
    required={"mlp_bias": False, "post_norm": False, "qk_norm": True},
    defaults={
        **{"rope_theta": 12e6, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "hidden_act": "xielu"},
    },
)
# the order matters: export writes the first one that fits
FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, ARCEE, NEOX, STARCODER2, GPT2, MPT, MIXTRAL, QWEN3_MOE, GLM4_MOE),
    *(PHI3, GRANITE, SMOLLM3, NEMOTRON, OLMO2, OLMO3, GEMMA, GEMMA2, GEMMA3, APERTUS),
)


def find_family(config: Config, only: Family | None = None) -> Family:
    """Return the first family that can represent the model, among all of them or `only` one. A model in SP that has
    multipliers came from a family that has them: of those the first, if any.

    Raises UserError with what the nearest would need: the one with the fewest mismatches, of those that have the
    model's positions if any does.
    """
    model, table = config.model, table_of(config)
    candidates = [(_mismatches(family, model), family) for family in ((only,) if only else FAMILIES)]
    if config.parameterization.name == "sp":
        for problems, family in candidates:
            if not problems and not folded(table, family.kept_multipliers(table, model)[0]):
                return family

    def distance(candidate: tuple[list[str], Family]) -> tuple[bool, int]:
        return model.positions not in candidate[1].values["positions"], len(candidate[0])

    missing, family = min(candidates, key=distance)
    if missing:
        nearest = f"Hugging Face has no architecture of this model; {family.architecture}, the nearest,"
        raise UserError(f"{family.architecture if only else nearest} needs {' and '.join(missing)}")
    return family


def family_of_type(model_type: object) -> Family:
    """Return the family that a config.json names. Raises UserError."""
    known = {family.model_type: family for family in FAMILIES}
    if not isinstance(model_type, str) or model_type not in known:
        raise UserError(f"config.json: model_type = {model_type!r} is not supported; choose from: {', '.join(known)}")
    return known[model_type]


def has_module(model: ModelConfig, module: str, layer: int = 0) -> bool:
    """Return whether our model has this module; layer: the block's index, for a module of a block."""
    if module == "unembedding":
        return not model.tied_embeddings
    if module == "positions":
        return model.positions == "learned"
    if module in ("attention.query_norm", "attention.key_norm"):
        return model.qk_norm
    if module in NORMS and module != "final_norm":
        return model.norm_placement in (("post", "both") if module.endswith("post_norm") else ("pre", "both"))
    if module.endswith(".gate") and not model.gated:
        return False
    if module in ALPHAS:
        return model.activation == "xielu"
    is_dense = layer < model.layers - model.expert_layers  # dense layers come first
    return not module.startswith("mlp.") or is_dense == (module in MLP)


def has_bias(model: ModelConfig, module: str) -> bool:
    """Return whether a module of ours has a bias."""
    if not model.bias:
        return model.qkv_bias and module == "attention.qkv"
    return module in LINEAR or (module in NORMS and model.norm == "layernorm")


def folded(table: Table, kept: Table) -> list[str]:
    """Return the multipliers of a table that are not those of another, and must be folded into the weights."""
    names = ("embedding", "residual", "logits", "attention")
    return [name for name in names if not math.isclose(getattr(table, name), getattr(kept, name), rel_tol=1e-12)]


def _mismatches(family: Family, model: ModelConfig) -> list[str]:
    """Return the settings, as a text each, that the family would need to represent the model."""
    derived = {
        "kv_heads": model.heads,
        "head_size": model.width // model.heads,
        "mlp_width": model.expert_width or 4 * model.width,
    }
    unmentioned = {name: (value,) for name, value in {**vars(ModelConfig()), **derived}.items()}
    free = {name: (getattr(model, name),) for name in family.free if hasattr(model, name)}
    mismatches = [
        f"model.{name} = {' or '.join(map(repr, allowed))}, not {getattr(model, name)!r}"
        for name, allowed in {**unmentioned, **free, **family.values}.items()
        if getattr(model, name) not in allowed
    ]
    if "experts" in family.keys and not model.experts:
        mismatches.append("model.experts of at least 1, not 0")
    if any(has_bias(model, module) and module not in family.bias for module in family.per_block):
        mismatches.append("model.bias = False, not True")
    if family.heads_divide_width and model.width % model.heads:
        mismatches.append(f"model.heads = {model.heads} to divide model.width = {model.width}")
    return mismatches
