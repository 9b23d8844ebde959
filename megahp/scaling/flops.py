"""Parameters and floating-point operations of the decoder, in closed form.

Matrix products count, a multiply-add as two operations, a backward pass as two forward ones: projections, MLP (or
the router and a token's experts), unembedding (of the padded vocabulary, since that is multiplied) and attention's two
products. Lookups, norms, softmax, activations, positions, the loss and the update do not. (Narayanan et al.,
arXiv 2104.04473; Korthikanti et al., arXiv 2205.05198)

`causal` counts half of attention's products, those below the diagonal, as Megatron-LM does today; without it all of
them count, as in those papers, PaLM, nanoGPT and torchtitan. So utilisations of the two kinds are not comparable.
"""

from megahp.config import ModelConfig


def parameters(model: ModelConfig, longest: int, active: bool = False) -> int:
    """Return the number of weights. longest: positions of a learned embedding. model: resolved, with its vocabulary.
    active: of experts count only those that a token is routed to, and the shared ones."""
    norm = model.width * (2 if model.norm == "layernorm" and model.bias else 1)
    block = (4 if model.norm_placement == "both" else 2) * norm
    if model.bias or model.qkv_bias:
        block += (model.heads + 2 * model.kv_heads) * model.head_size
    if model.bias:
        block += model.width + (_mlp_matrices(model) - 1) * model.mlp_width + model.width
    if model.qk_norm:
        block += (model.heads + model.kv_heads if model.qk_norm_whole else 2) * model.head_size
    if model.activation == "xielu":
        block += 2
    embeddings = (1 if model.tied_embeddings else 2) * model.padded_vocab * model.width
    positions = longest * model.width if model.positions == "learned" else 0
    experts = model.experts_per_token if active else model.experts
    return sum(_matrices(model, experts)) + model.layers * block + norm + embeddings + positions


def training_flops(model: ModelConfig, length: int, causal: bool = True, recomputed_layers: int = 0) -> float:
    """Return the operations of one token's forward and backward pass, in sequences of `length` tokens.

    With no recomputed layers these are model FLOPs, whose share of the peak is MFU. Each layer that is recomputed in
    the backward pass adds a forward pass (the mean layer's): hardware FLOPs, and HFU.
    """
    products = sum(_layers(model, length, causal))
    logits = 2 * model.width * model.padded_vocab
    return (3 + recomputed_layers / model.layers) * products + 3 * logits


def layer_costs(model: ModelConfig, length: int) -> list[float]:
    """Return the operations of one token's forward pass in each layer, for splitting layers over pipeline stages.

    The last layer's include the unembedding's. They count 4/3 times: the loss keeps no logits and computes them again
    in the backward pass, so a whole step does 4 of its products for 3 of a layer's.
    """
    layers, logits = _layers(model, length), 2 * model.width * model.padded_vocab
    return [*layers[:-1], layers[-1] + 4 / 3 * logits]


def pipeline_bubble(ranks: int, microbatches: int, stages_per_rank: int = 1) -> float:
    """Return idle over busy time of 1F1B on p pipeline ranks, interleaved with v stages a rank: (p-1) / (v m).
    (Narayanan et al., arXiv 2104.04473, section 2.2)"""
    return (ranks - 1) / (stages_per_rank * microbatches)


def _layers(model: ModelConfig, length: int, causal: bool = True) -> list[float]:
    """Return the operations of one token's forward pass in each layer."""
    costs = []
    for block, matrices in enumerate(_matrices(model, model.experts_per_token)):
        window = min(model.window_of(block) or length, length)
        attended = window * (1 - window / (2 * length)) if causal else window  # keys of a query, on average
        costs.append(2 * (matrices + 2 * attended * model.heads * model.head_size))
    return costs


def _matrices(model: ModelConfig, experts: int) -> list[int]:
    """Return the number of weights in each layer's matrices, counting this many experts and the shared ones."""
    attention = 2 * (model.heads + model.kv_heads) * model.head_size
    dense = attention + _mlp_matrices(model) * model.mlp_width
    routed = _mlp_matrices(model) * (experts + model.shared_experts) * model.expert_width
    sparse = attention + model.experts + routed
    layers = [dense] * (model.layers - model.expert_layers) + [sparse] * model.expert_layers
    return [model.width * layer for layer in layers]


def _mlp_matrices(model: ModelConfig) -> int:
    return 3 if model.gated else 2
