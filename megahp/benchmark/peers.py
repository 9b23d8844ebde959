"""The models that people would train instead, as baselines of `megahp benchmark training`: on one rank, the same shape.

Each is its library's own model and loss, with random weights: Hugging Face's Llama in float32, whose Trainer runs bf16
by autocast; megatron-core's GPT of its local layers, whose weights are bfloat16 then, beside the optimizer's copies in
float32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megahp.config import ModelConfig


class HuggingFaceLlama(nn.Module):
    """Compute the mean loss of tokens, targets [batch, length], in nats per token."""

    def __init__(self, model: ModelConfig, length: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=model.padded_vocab,
            hidden_size=model.width,
            intermediate_size=model.mlp_width,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            head_dim=model.head_size,
            max_position_embeddings=length,
            rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            use_cache=False,
            attn_implementation="sdpa",  # type: ignore[call-arg] # taken by its base class
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=targets, shift_labels=targets.contiguous()).loss
        return loss


class MegatronGPT(nn.Module):
    """Compute the mean loss of tokens, targets [batch, length], in nats per token. Where there is no GPU, Megatron's
    questions about it are answered with the CPU."""

    def __init__(self, model: ModelConfig, length: int, dtype: torch.dtype) -> None:
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.transformer_config import TransformerConfig

        super().__init__()
        if not parallel_state.is_initialized():
            parallel_state.initialize_model_parallel(1, 1)
        config = TransformerConfig(
            num_layers=model.layers,
            hidden_size=model.width,
            num_attention_heads=model.heads,
            kv_channels=model.head_size,
            ffn_hidden_size=model.mlp_width,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=F.silu,
            normalization="RMSNorm",
            layernorm_epsilon=model.norm_eps,
            hidden_dropout=0,
            attention_dropout=0,
            masked_softmax_fusion=torch.cuda.is_available(),
            gradient_accumulation_fusion=False,  # of apex
            use_cpu_initialization=True,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
        )
        with on_this_device():
            self.model = GPTModel(
                config,
                get_gpt_layer_local_spec(normalization="RMSNorm"),
                model.padded_vocab,
                length,
                position_embedding_type="rope",
                rotary_base=round(model.rope_theta),
                share_embeddings_and_output_weights=False,
            )
        later = torch.ones(1, 1, length, length).triu(1) > 0
        self.register_buffer("later", later, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        with on_this_device():
            losses: Tensor = self.model(tokens, positions, self.later, labels=targets)
        return losses.mean()


def on_this_device() -> AbstractContextManager[None]:
    return nullcontext() if torch.cuda.is_available() else on_cpu()


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let Megatron run without a GPU: it asks for the current one, waits for it, and keeps its random state."""
    from megatron.core import tensor_parallel

    no_tracker = SimpleNamespace(fork=nullcontext)
    with (
        patch.object(torch.cuda, "current_device", lambda: "cpu"),
        patch.object(torch.cuda, "synchronize", lambda *_: None),
        patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda *_, **__: no_tracker),
    ):
        yield
