"""Parameters and floating-point operations of the decoder, in closed form.

Counted are matrix products, a multiply-add as two operations, a backward pass as two forward ones: projections, MLP,
unembedding (of the padded vocabulary, which is what is multiplied) and attention's two products. Not counted are
look-ups, norms, softmax, activations, positions, the loss, and the update. (Narayanan et al., arXiv 2104.04473;
Korthikanti et al., arXiv 2205.05198.)

`causal` counts half of attention's products, those below the diagonal, as Megatron-LM does today; without it all of
them, as in those papers, PaLM, nanoGPT and torchtitan. So utilisations of the two kinds are not comparable.
"""

from __future__ import annotations

from megahp.config import Model


def parameters(model: Model, longest: int) -> int:
    """Number of weights; longest: positions of a learned embedding. model: resolved, with its vocabulary."""
    norm = model.width * (2 if model.norm == "layernorm" and model.bias else 1)
    block = _matrices(model) + 2 * norm
    if model.bias:
        block += (model.heads + 2 * model.kv_heads) * model.head_size + model.width  # attention
        block += (_mlp_matrices(model) - 1) * model.mlp_width + model.width
    if model.qk_norm:
        block += 2 * model.head_size
    embeddings = (1 if model.tied_embeddings else 2) * model.padded_vocab * model.width
    positions = longest * model.width if model.positions == "learned" else 0
    return model.layers * block + norm + embeddings + positions


def training_flops(model: Model, length: int, causal: bool = True, recomputed_layers: int = 0) -> float:
    """Operations of one token's forward and backward pass, in sequences of `length` tokens.

    With no recomputed layers these are model FLOPs, whose share of the peak is MFU. Each layer that runs forward a
    second time in the backward pass adds that: hardware FLOPs, and HFU.
    """
    layer, logits = _layer(model, length, causal), 2 * model.width * model.padded_vocab
    return (3 * model.layers + recomputed_layers) * layer + 3 * logits


def layer_costs(model: Model, length: int) -> list[float]:
    """Operations of one token's forward pass in each layer, in sequences of `length` tokens; the unembedding's, forward
    and once more in the backward pass of a loss that keeps no logits, are the last layer's."""
    layer, logits = _layer(model, length, causal=True), 2 * model.width * model.padded_vocab
    return [layer] * (model.layers - 1) + [layer + 4 / 3 * logits]


def _layer(model: Model, length: int, causal: bool) -> float:
    """Operations of one token's forward pass in one layer."""
    attended = length / 2 if causal else length  # keys a query meets, on average
    return 2 * _matrices(model) + 2 * 2 * attended * model.heads * model.head_size


def _matrices(model: Model) -> int:
    """Weights of one layer's matrices."""
    attention = 2 * (model.heads + model.kv_heads) * model.head_size * model.width
    return attention + _mlp_matrices(model) * model.mlp_width * model.width


def _mlp_matrices(model: Model) -> int:
    return 3 if model.activation == "swiglu" else 2
