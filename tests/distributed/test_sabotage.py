"""Dropping any one reduction shows: for each there is a measure that no longer agrees with one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.bias import causal_upper_left

from distributed import training, world
from distributed.training import Training, differences, settings_of, train
from megahp.model import norm, positions, transformer
from megahp.model.moe import Experts, Router
from megahp.parallel import collectives, context, cross_entropy, tensor
from megahp.parallel.layout import EXPERT_SHARDS, SHARDS
from megahp.parallel.mesh import Axis, Mesh
from megahp.parallel.owners import Owners
from megahp.train.engine import Engine

SPLIT = ("parallel.tp=2", "parallel.sequence_parallel=true")
PLAIN = ("parallel.tp=2",)
CONTEXT = ("parallel.cp=2", "batch.micro_batch=8")
EXPERTS = ("parallel.ep=2",)
REPLICAS = ("parallel.dp_replicate=2",)
OF_SHARDS = (*REPLICAS, "parallel.dp_shard=2")  # on four ranks, all others on two
ALL_REDUCE = dist.all_reduce
EXCHANGE = Owners._exchange
VALIDATE = training.validate
REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)  # torch 2.13


def unchanged(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x


def own_slice(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


def all_but_largest(x: torch.Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    return x if op == dist.ReduceOp.MAX else collectives.all_reduce(x, group, op)


def only_largest(x: torch.Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    return collectives.all_reduce(x, group, op) if op == dist.ReduceOp.MAX else x


def validate_alone(*arguments: Any) -> Any:
    with mock.patch.object(dist, "all_reduce", lambda *_, **__: None):
        return VALIDATE(*arguments)


def keep_own(*, output: torch.Tensor, input: torch.Tensor, **_: Any) -> None:
    output.copy_(input.chunk(dist.get_world_size())[dist.get_rank()])


def only_over_all_ranks(
    x: torch.Tensor, *arguments: Any, group: dist.ProcessGroup | None = None, **options: Any
) -> Any:
    return None if group else ALL_REDUCE(x, *arguments, **options)


def only_its_owner_has_it(update: torch.Tensor, group: dist.ProcessGroup, group_src: int) -> None:
    if group.rank() != group_src:
        update.zero_()


def nothing_but_its_own(self: Owners, pieces: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """What ranks send to each other is lost."""
    received, rank = EXCHANGE(self, pieces, sizes), self.replica.rank()
    for sender, piece in enumerate(received.split(sizes)):
        if sender != rank:
            piece.zero_()
    return received


@contextlib.contextmanager
def without_row_sum(name: str) -> Iterator[None]:
    """One parameter's row says nothing of the axes its gradient is summed over."""
    init = Training.__init__

    def crippled(self: Training, *arguments: Any) -> None:
        init(self, *arguments)
        assert self.engine.rows[name].sum_over
        self.engine.rows[name] = replace(self.engine.rows[name], sum_over=())

    with mock.patch.object(Training, "__init__", crippled):
        yield


@contextlib.contextmanager
def without_the_other_copy() -> Iterator[None]:
    """A tied weight's two copies keep their gradients to themselves."""
    init = Training.__init__

    def crippled(self: Training, *arguments: Any) -> None:
        init(self, *arguments)
        self.engine.rows = {name: replace(row, tied=False) for name, row in self.engine.rows.items()}

    with mock.patch.object(Training, "__init__", crippled):
        yield


@contextlib.contextmanager
def without_sum_before_squaring(name: str) -> Iterator[None]:
    """One norm squares per-example gradients of its own tokens or heads only."""
    init = Training.__init__

    def crippled(self: Training, *arguments: Any) -> None:
        init(self, *arguments)
        module = self.engine.stages[0].get_submodule(name)
        assert module.group
        module.group = ""

    with mock.patch.object(Training, "__init__", crippled):
        yield


@contextlib.contextmanager
def counting_examples_twice() -> Iterator[None]:
    """Every rank's copy of a probe, summed over the ranks an example lies on, enters the sum over all ranks."""
    init = Training.__init__

    def crippled(self: Training, *arguments: Any) -> None:
        init(self, *arguments)
        self.engine.contributes[1 : 1 + len(self.engine.probes)] = 1

    with mock.patch.object(Training, "__init__", crippled):
        yield


def from_the_beginning(x: torch.Tensor, dim: int, context: Axis) -> torch.Tensor:
    return x.narrow(dim, 0, x.shape[dim] // context.size)


@contextlib.contextmanager
def bias_from_the_beginning() -> Iterator[None]:
    """Of the first queries there are."""
    bias = positions._bias

    def of_the_first(queries: slice, *arguments: Any, **named: Any) -> torch.Tensor | None:
        return bias(slice(0, queries.stop - queries.start), *arguments, **named)

    with mock.patch.object(positions, "_bias", of_the_first):
        yield


@contextlib.contextmanager
def counting_copies() -> Iterator[None]:
    """Every rank's copy of a weight that is whole on several ranks enters the norm."""
    init = Training.__init__

    def crippled(self: Training, *arguments: Any) -> None:
        init(self, *arguments)
        self.engine.contributes[-len(self.engine.weights) :] = 1

    with mock.patch.object(Training, "__init__", crippled):
        yield


def backward_without(function: type, collective: str, instead: Callable[..., Any]) -> Any:
    """The adjoint of one collective left out, its forward kept."""
    backward = function.backward

    def crippled(ctx: Any, *grads: torch.Tensor) -> Any:
        with mock.patch.object(collectives, collective, instead):
            return backward(ctx, *grads)

    return mock.patch.object(function, "backward", staticmethod(crippled))


def forward_without(function: type, collective: str, instead: Callable[..., Any]) -> Any:
    forward = function.forward

    def crippled(ctx: Any, *arguments: Any) -> Any:
        with mock.patch.object(collectives, collective, instead):
            return forward(ctx, *arguments)

    return mock.patch.object(function, "forward", staticmethod(crippled))


@contextlib.contextmanager
def with_each(kind: type, breaks: Callable[[Any], Any]) -> Iterator[None]:
    """Something done to every module of a kind, once the model stands."""
    init = Training.__init__

    def crippled(self: Training, *arguments: Any) -> None:
        init(self, *arguments)
        for module in self.engine.stages[0].modules():
            if isinstance(module, kind):
                breaks(module)

    with mock.patch.object(Training, "__init__", crippled):
        yield


def nothing_arrives(x: torch.Tensor, _sent: Any, received: Any, _group: dist.ProcessGroup) -> torch.Tensor:
    return x.new_zeros(sum(received), *x.shape[1:])


def by_its_own_load(self: Engine, _load: Any) -> None:
    for router in self.routers.values():
        router.rebalance(router.probe.grad[:-1])


def counted_by_every_tp_rank(router: Router) -> None:
    router.coefficient *= router.axis.size


def experts_over(axis: str) -> Any:
    """Experts' gradients summed over one axis alone."""
    fsdp = Mesh.fsdp

    def crippled(self: Mesh, shards: tuple[str, ...] = SHARDS) -> Any:
        return self.devices[axis] if shards == EXPERT_SHARDS else fsdp(self, shards)

    return mock.patch.object(Mesh, "fsdp", crippled)


# name -> (model, layout, what is broken). Every reduction there is stands here once.
SABOTAGE: dict[str, tuple[str, tuple[str, ...], Callable[[], Any]]] = {
    "norm weight over tp (sp)": ("llama", SPLIT, lambda: without_row_sum("blocks.0.mlp_norm.weight")),
    "norm bias over tp (sp)": ("gpt2", SPLIT, lambda: without_row_sum("final_norm.bias")),
    "row-parallel bias over tp (sp)": ("gpt2", SPLIT, lambda: without_row_sum("blocks.1.mlp.down.bias")),
    "position embedding over tp (sp)": ("gpt2", SPLIT, lambda: without_row_sum("positions.weight")),
    "query norm weight over tp": ("llama", PLAIN, lambda: without_row_sum("blocks.0.attention.query_norm.weight")),
    "norm of all heads, weight": ("olmo", PLAIN, lambda: without_row_sum("blocks.0.attention.key_norm.weight")),
    "norm of all heads, forward": ("olmo", PLAIN, lambda: mock.patch.object(norm, "sum_from", unchanged)),
    "norm of all heads, backward": ("olmo", PLAIN, lambda: mock.patch.object(norm, "copy_to", unchanged)),
    "xIELU's curvatures over tp": ("olmo", PLAIN, lambda: without_row_sum("blocks.0.mlp.alpha_n")),
    "shared key and value heads, backward": (
        "gemma",
        PLAIN,
        lambda: backward_without(collectives._Gather, "reduce_scatter", own_slice),
    ),
    "tied embedding over both ends of a pipeline": ("gpt2", ("parallel.pp=2",), without_the_other_copy),
    "per-example norm before squaring (sp)": ("llama", SPLIT, lambda: without_sum_before_squaring("final_norm")),
    "per-example norm before squaring (heads)": (
        "llama",
        PLAIN,
        lambda: without_sum_before_squaring("blocks.1.attention.key_norm"),
    ),
    "loss, norms and probes over all ranks": (
        "llama",
        (),
        lambda: mock.patch("megahp.train.engine.dist.all_reduce", lambda *_, **__: None),
    ),
    "weights counted once": ("llama", PLAIN, counting_copies),
    "gradients over shards": ("llama", (), lambda: mock.patch.object(dist, REDUCE_SCATTER, keep_own)),
    "gradients over replicas": ("llama", REPLICAS, lambda: mock.patch.object(dist, "all_reduce", only_over_all_ranks)),
    "gradients over replicas of shards": (
        "llama",
        OF_SHARDS,
        lambda: mock.patch.object(dist, "all_reduce", only_over_all_ranks),
    ),
    "gradients summed, not averaged": (
        "llama",
        (),
        lambda: mock.patch.object(FSDPModule, "set_gradient_divide_factor", lambda *_: None),
    ),
    "copy_to, backward": ("llama", PLAIN, lambda: backward_without(collectives._Copy, "all_reduce", unchanged)),
    "sum_from, forward": ("llama", PLAIN, lambda: forward_without(collectives._Sum, "all_reduce", unchanged)),
    "gather_from, backward": (
        "llama",
        SPLIT,
        lambda: backward_without(collectives._Gather, "reduce_scatter", own_slice),
    ),
    "sum_scatter, forward": (
        "llama",
        SPLIT,
        lambda: forward_without(collectives._SumScatter, "reduce_scatter", own_slice),
    ),
    "keys and values of all ranks, backward (cp)": (
        "llama",
        CONTEXT,
        lambda: backward_without(collectives._Gather, "reduce_scatter", own_slice),
    ),
    "keys and values in the order of the sequence": (
        "llama",
        CONTEXT,
        lambda: mock.patch.object(context, "restore_order", unchanged),
    ),
    "causal mask of a later span (cp)": (
        "llama",
        CONTEXT,
        lambda: mock.patch("torch.nn.attention.bias.causal_lower_right", causal_upper_left),
    ),
    "mask and distances of a later span (cp)": ("alibi", CONTEXT, bias_from_the_beginning),
    "rotary positions (cp)": (
        "llama",
        CONTEXT,
        lambda: mock.patch.object(transformer, "shard_sequence", from_the_beginning),
    ),
    "learned positions (cp)": (
        "gpt2",
        CONTEXT,
        lambda: mock.patch.object(tensor, "shard_sequence", from_the_beginning),
    ),
    "gradients over cp": ("llama", CONTEXT, lambda: mock.patch.object(dist, REDUCE_SCATTER, keep_own)),
    "per-example norm before squaring (cp)": ("llama", CONTEXT, lambda: without_sum_before_squaring("final_norm")),
    "per-example norm before squaring (heads, cp)": (
        "llama",
        CONTEXT,
        lambda: without_sum_before_squaring("blocks.0.attention.query_norm"),
    ),
    "probes counted once (cp)": ("llama", CONTEXT, counting_examples_twice),
    "validation loss over cp": ("llama", CONTEXT, lambda: mock.patch.object(training, "validate", validate_alone)),
    "cross-entropy, largest logit": (
        "llama",
        PLAIN,
        lambda: mock.patch.object(cross_entropy, "all_reduce", all_but_largest),
    ),
    "cross-entropy, sums": ("llama", PLAIN, lambda: mock.patch.object(cross_entropy, "all_reduce", only_largest)),
    "muon, the parts of a replica's ranks (tp)": (
        "muon",
        PLAIN,
        lambda: mock.patch.object(Owners, "_exchange", nothing_but_its_own),
    ),
    "muon, the parts of a replica's ranks": (
        "muon",
        (),
        lambda: mock.patch.object(Owners, "_exchange", nothing_but_its_own),
    ),
    "muon, the updates of other replicas": (
        "muon",
        REPLICAS,
        lambda: mock.patch("megahp.parallel.owners.dist.broadcast", only_its_owner_has_it),
    ),
    "router over tp": ("moe", PLAIN, lambda: without_row_sum("blocks.1.mlp.router.weight")),
    "balance loss, one tp rank's": ("moe-loss", PLAIN, lambda: with_each(Router, counted_by_every_tp_rank)),
    "expert load over all ranks": ("moe", (), lambda: mock.patch.object(Engine, "rebalance", by_its_own_load)),
    "tokens to their experts": (
        "moe",
        EXPERTS,
        lambda: forward_without(collectives._Exchange, "all_to_all", nothing_arrives),
    ),
    "tokens to their experts, backward": (
        "moe",
        EXPERTS,
        lambda: backward_without(collectives._Exchange, "all_to_all", nothing_arrives),
    ),
    "experts' gradients over shards": ("moe", (), lambda: experts_over("cp")),
    "experts' gradients over replicas": ("moe", OF_SHARDS, lambda: experts_over("dp_shard")),
    "experts' gradients summed, not averaged": (
        "moe",
        (),
        lambda: with_each(Experts, lambda experts: experts.set_gradient_divide_factor(2.0)),
    ),
    "validation loss": ("llama", (), lambda: mock.patch.object(training, "validate", validate_alone)),
}


def trained_sabotaged() -> dict[str, Any]:
    found, is_four = {}, dist.get_world_size() == 4
    for name, (model, layout, breaks) in SABOTAGE.items():
        if (layout == OF_SHARDS) == is_four:
            with breaks():
                found[name] = train(settings_of(model, *layout), 2)
    return found


def trained_soundly(models: list[str]) -> dict[str, Any]:
    return {model: train(settings_of(model), 2) for model in models}


@pytest.fixture(scope="module")
def outcomes() -> tuple[dict[str, Any], dict[str, Any]]:
    sound = world.run(1, trained_soundly, sorted({model for model, *_ in SABOTAGE.values()}))[0]
    return world.run(2, trained_sabotaged)[-1] | world.run(4, trained_sabotaged)[-1], sound


@pytest.mark.parametrize("name", SABOTAGE)
def test_dropping_a_reduction_shows(outcomes: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    sabotaged, sound = outcomes
    assert differences(sabotaged[name], sound[SABOTAGE[name][0]], 1e-5, None) != []
