"""The most that a rank allocates in a step, by formulas: bytes of each kind at the moment of the peak.

Of megahp's own step within a tenth of a trace's (tests/plan/test_formulas.py).
"""

from collections import Counter
from collections.abc import Mapping

from megahp.parallel.logits import KEPT, rows_at_once
from megahp.plan.rank import Rank
from megahp.plan.schedules import rank_actions, steady
from megahp.scaling.memory import moments_per_weight


def peak(rank: Rank) -> Counter[str]:
    """Return the bytes of weights, gradients, moments, gathered weights, activations, and what is temporary, at that
    moment of three when they are most together: in the loss, in the backward pass of a block, and at its end."""
    states, flying = _states(rank), _in_flight(rank)
    kept, kept_of_loss = _activations(rank, flying), _kept_of_loss(rank)
    others = max(0, flying[max(rank.stages)] - 1)  # microbatches whose loss is still to go backward, in a block's time
    in_block = Counter(activations=int(kept + others * kept_of_loss), temporary=int(_of_block(rank)))
    in_loss = Counter(activations=int(kept + (others + 1) * kept_of_loss), temporary=int(_of_loss(rank)))
    at_end = Counter[str]()
    if rank.stack.states != "megatron" and rank.layout.is_sharded:
        unit, outer = rank.block_weights + rank.expert_weights, rank.outer_weights
        zero3 = rank.parallel.zero_level == 3
        in_loss["gathered"] = rank.e * (outer if zero3 else rank.weights)
        in_block["gathered"] = rank.e * min(rank.weights, outer + 2 * unit if zero3 else rank.weights)
        at_end["gathered"] = in_loss["gathered"]
        # in the end the gradient of all weights of a unit, and what of it is sent, in the place of what it is made from
        made, sent = rank.e, rank.stack.reduced_bytes
        in_block["temporary"] = max(in_block["temporary"], (made + sent) * unit)
        at_end["temporary"] = (sent if rank.accumulates else made + sent) * outer
    return +(states + max(in_block, in_loss, at_end, key=lambda kinds: sum(kinds.values())))


def _states(rank: Rank) -> Counter[str]:
    """Return the bytes that stay, with whole gradients from one microbatch to the next."""
    stack, layout, weights = rank.stack, rank.layout, rank.weights
    if stack.states == "megatron":
        moments = 12 * rank.own_weights  # with the weights in float32
        return Counter(weights=rank.e * weights, gradients=stack.gradient_bytes * weights, moments=moments)
    whole = not layout.is_sharded or rank.accumulates
    gradients = stack.gradient_bytes * (weights if whole else rank.own_weights)
    hidden = rank.own_weights - rank.own_outer_weights
    # whole matrices' moments are on one rank each, so replicas share them too
    copies = 1 if rank.config.optimizer.name in ("adamw", "muon") else layout.dp_replicate
    moments = int(8 * rank.own_weights - 4 * hidden * (2 - moments_per_weight(rank.config) / copies))
    return Counter(weights=4 * rank.own_weights, moments=moments, gradients=gradients)


def _in_flight(rank: Rank) -> dict[int, int]:
    """Return the microbatches whose activations each stage keeps at the moment when those of all together are most."""
    if rank.layout.pp == 1:
        return dict.fromkeys(rank.stages, 1)
    few, _ = steady(rank.parallel, rank.count)
    held = dict.fromkeys(rank.stages, 0)
    most = dict(held)
    for kind, stage, _ in rank_actions(rank.position, rank.parallel, few):
        held[stage] += {"F": 1, "B": -1, "W": -1, "I": 0}[kind]
        if sum(held.values()) > sum(most.values()):
            most = dict(held)
    return most


def _activations(rank: Rank, flying: Mapping[int, int]) -> float:
    """Return the bytes that the blocks' forward passes keep for the backward ones."""
    kept = 0.0
    for stage, blocks in rank.stages.items():
        for (recompute, dense), alike in Counter(map(rank.kind, blocks)).items():
            kept += flying[stage] * alike * rank.e * kept_numbers(rank, recompute, dense)
    if rank.stack.states == "fsdp2" and rank.layout.pp > 1:
        # torch's stages receive every microbatch's stream, and its gradient, into a buffer of its own
        received = 2 * len(rank.stages) - rank.is_first - rank.is_last
        kept += received * rank.count * rank.e * rank.r * rank.model.width
    if rank.stack.states == "fsdp2" and not rank.layout.is_sharded and rank.e < 4:
        kept += rank.e * (rank.weights - rank.outer_weights)  # no gathering casts the weights, so each layer does
    return kept


def _kept_of_loss(rank: Rank) -> float:
    """Return the bytes that the final norm and the loss of a microbatch keep."""
    if not rank.is_last:
        return 0
    logits = rank.t * rank.vocabulary
    kept = 4 * logits if rank.stack.whole_logits else rank.e * logits * (rank.e * logits <= KEPT)
    return 2 * rank.e * rank.r * rank.model.width + kept


def kept_numbers(rank: Rank, recompute: str, dense: bool) -> float:
    """Return the numbers that a block's backward pass needs of its forward pass."""
    model, stack, t, r = rank.model, rank.stack, rank.t, rank.r
    width, queries, keys = model.width, rank.queries, rank.keys
    if recompute == "full":
        return r * width
    hidden, rows = (rank.hidden, t) if dense else (model.expert_width // rank.layout.tp, t * model.experts_per_token)
    inner = 2 if model.gated else 1  # products into the hidden layer
    if recompute == "selective" and stack.fused_attention:  # the results of products, and attention's
        products = (rank.fused + width) * t + width * r + inner * hidden * rows
        return r * width + stack.kept_products * products + queries * t
    lean = stack.elementwise == "compiled"
    # the stream before both branches and both norms of it; where the sequence is split, what the branches gather
    numbers: float = (2 if lean else 4) * width * r
    if rank.parallel.sequence_parallel and stack.states != "megatron":  # which gathers again
        numbers += 2 * width * t
    numbers += (2 * queries + 2 * keys + queries) * t  # and attention's result in two layouts
    numbers += (inner if lean else 2 * inner) * hidden * rows + (0 if dense else 2 * width * rows)
    if not stack.fused_attention and recompute == "none":
        cells = rank.sequences * (model.heads / rank.layout.tp) * rank.length**2 / rank.layout.cp
        numbers += cells * (2.5 if stack.dropout else 1)
    if stack.dropout:
        numbers += width * r  # masks of a byte on both branches
    return numbers


def _of_block(rank: Rank) -> float:
    """Return the bytes beside in the backward pass of one block: gradients, and what is computed again."""
    model, t, e = rank.model, rank.t, rank.e
    hidden = rank.hidden if not model.experts else model.expert_width // rank.layout.tp * model.experts_per_token
    size: float = e * t * ((3 if model.gated else 2) * hidden + 2 * model.width)
    recompute, dense = rank.kind(rank.blocks[0])
    if recompute != "none":
        size += e * (kept_numbers(rank, "none", dense) - kept_numbers(rank, recompute, dense))
    return size


def _of_loss(rank: Rank) -> float:
    """Return the bytes beside in the loss's backward pass."""
    t, e, width, vocabulary = rank.t, rank.e, rank.model.width, rank.vocabulary
    if not rank.is_last:
        return 0
    if rank.stack.whole_logits:
        return (4 + e) * t * vocabulary
    # a slice in float32 and its gradient; the gradients of the stream, and of the matrix
    return (4 + 2 * e) * t * min(vocabulary, rows_at_once(t, width)) + 4 * t * width + e * vocabulary * width
