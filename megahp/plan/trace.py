"""Trace one optimizer step of one rank on fake tensors.

The model, engine and optimizer are those that will train; weights, activations and the other ranks are not there. A
trace therefore holds the products, bytes and collectives that will run, and the peak of what is allocated.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from threading import Lock
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.attention.bias import causal_lower_right
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megahp.config import Config, with_values
from megahp.data.loader import Batch
from megahp.model.build import build_model
from megahp.model.transformer import Transformer
from megahp.parallel.layout import AXES, EXPERT_SHARDS, SHARDS, WITHIN_REPLICA, fit
from megahp.parallel.mesh import Mesh, make_mesh
from megahp.parallel.owners import Owners
from megahp.parallel.parameters import storage
from megahp.parallel.stages import stage_blocks
from megahp.plan.work import Collective, Kernel, Phase, Work, first_step, on_gpus
from megahp.scaling.parameterization import table_of
from megahp.train.engine import Engine
from megahp.train.optimizer import make_optimizer

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
GROUPED = "_grouped_mm"  # of experts: rows of a matrix, or columns, are those of one product after the other
FREE = ("aten::detach", "aten::_unsafe_view")  # views, though their schemas do not say so
ATTENTION = "_scaled_dot_product"
COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
SILENT = ("barrier", "wait_tensor", "_wrap_tensor_autograd")  # of the same namespaces, which send nothing


def trace_step(config: Config, ranks: int, rank: int = 0) -> Work:
    """Trace a whole step of one rank, the equal parts of it only as often as needed.

    Blocks are alike, or repeat in a period, and so are microbatches: every further one adds the same again, so that two
    small numbers of either say what many take. Not too small: the first and the last differ from those between, since
    FSDP2 gathers nothing ahead of the first and reduces after the last, and a pipeline fills and drains.
    """
    layout, model, parallel = fit(config.parallel, ranks), config.model, config.parallel
    count = first_step(config, layout.dp).num_microbatches(layout.dp)
    few, more = (2, 3) if layout.pp == 1 else (layout.pp + 1, layout.pp + 2)
    if layout.pp > 1 and parallel.schedule != "1f1b":  # which go in rounds of as many microbatches as ranks
        few, more = 2 * layout.pp, 3 * layout.pp

    def with_fewer(blocks: int) -> Work:
        """Trace without this many blocks of every stage."""
        sizes = [len(stage) - blocks for stage in stage_blocks(config)]
        values = {"model.layers": sum(sizes), "sparsity.layers": (), "parallel.split": tuple(sizes) * (layout.pp > 1)}
        shallow = with_values(config, values)
        if count <= more:
            return trace(shallow, ranks, rank)
        return trace(shallow, ranks, rank, few).extrapolate(
            trace(shallow, ranks, rank, more), (count - more) // (more - few)
        )

    every = (config.compute.recompute_every, model.full_attention_every, model.no_rope_every)
    period = math.lcm(*(number or 1 for number in every))
    least = model.dense_layers + (3 if layout.pp == 1 else 1)
    spare = (min(map(len, stage_blocks(config))) - least) // period
    if spare < 2:
        return with_fewer(0)
    whole = with_fewer(spare * period).extrapolate(with_fewer((spare - 1) * period), spare - 1)
    if config.optimizer.name == "adamw":
        return whole
    # which of the matrices a rank owns does not repeat with the blocks
    return whole.with_update_of(trace(config, ranks, rank, update_only=True))


def trace(config: Config, ranks: int, rank: int = 0, microbatches: int = 0, update_only: bool = False) -> Work:
    """Trace a step of one of the ranks. Must be called in a process without a process group.

    microbatches: how many of the step's to run, at most, since they are alike; 0 = all. Kernels and collectives are
    those of these. update_only: the optimizer's update alone, with the weights in the place of their gradients. Raises
    UserError for a layout that these ranks cannot run.
    """
    if dist.is_initialized():
        raise RuntimeError("a trace needs a process group of its own")
    layout = fit(config.parallel, ranks)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        mesh = make_mesh(layout, torch.device("cpu"))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with recording(mesh, fake, on_gpu=config.train.device != "cpu") as recorder:
            step(on_gpus(config), mesh, recorder, microbatches, update_only)
        return recorder.trace()
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds meshes, which the next trace's equal: of groups that are gone


@contextmanager
def recording(mesh: Mesh, fake: FakeTensorMode | None = None, on_gpu: bool = False) -> Iterator[Recorder]:
    """Record what is called and allocated in this block and in those of `Recorder.running`. Without `fake` on real
    tensors."""
    recorder = Recorder(mesh, fake)
    resize = torch.UntypedStorage.resize_

    def observed(store: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(store, size)
        recorder.resized(store)
        return store

    def lower_right(queries: int, keys: int) -> Tensor | None:
        if on_gpu:
            return None  # flash kernels need no mask; shapes, all that a trace computes, are those of is_causal
        with _disable_current_modes():
            return causal_lower_right(queries, keys)

    with ExitStack() as restored:
        # FSDP2 frees gathered weights by resizing their storage to 0, which no dispatch mode sees
        restored.enter_context(patch.object(torch.UntypedStorage, "resize_", observed))
        # under a dispatch mode torch cannot make this subclass of Tensor
        restored.enter_context(patch("torch.nn.attention.bias.causal_lower_right", lower_right))
        # DTensor finds the shape of a result, once, by an operation on whole fake tensors: nothing that a rank runs
        restored.enter_context(patch.object(ShardingPropagator, "_fake_mode_lock", recorder.paused))
        yield recorder


class Recorder(TorchDispatchMode):
    """Records every kernel, collective and allocation, in order."""

    def __init__(self, mesh: Mesh, fake: FakeTensorMode | None) -> None:
        super().__init__()
        self.fake, self.axes = fake, _axes_of_groups(mesh)
        self.phase: Phase = "build"
        self.paused = Lock()  # held while nothing is recorded
        self.load = 0  # tokens of each expert in one microbatch
        self.kernels: Counter[Kernel] = Counter()
        self.collectives: Counter[Collective] = Counter()
        self.sizes: dict[int, int] = {}  # bytes of every storage that is alive, by a number of its own
        self.numbers: dict[int, int] = {}  # address of a storage object -> its number
        self.kinds: list[str] = []  # of every storage so far
        self.changes: list[tuple[int, int]] = []  # (number, bytes more or less)
        self.resident = 0  # bytes that are left at the end of what was last recorded

    @contextmanager
    def running(self, phase: Phase) -> Iterator[None]:
        """Record a block of code as this phase."""
        self.phase = phase
        with ExitStack() as modes:
            if self.fake:
                modes.enter_context(self.fake)
            modes.enter_context(self)
            yield
            self.resident = sum(self.sizes.values())  # here: model and moments go with the functions that hold them

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until DTensor has made of it what runs on this rank's part
        name = op._schema.name.partition("::")[2]
        if name == "_local_scalar_dense" and self.fake:
            # what the step reads of a fake number, so that shapes are those of a real step: offsets of a part in its
            # weight (which only slices by its size), experts chosen equally often, pipeline stages that agree to run
            return 1 if args[0].dtype is torch.int32 else self.load if self.phase == "forward" else 0
        out = op(*args, **(kwargs or {}))
        if self.paused.locked():
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if op.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            self._collective(name, args, [*inputs, *outputs])
        elif not _is_free(op, outputs):
            arguments = zip(args, op._schema.arguments, strict=False)
            written = [arg for arg, row in arguments if row.alias_info is not None and row.alias_info.is_write]
            in_place = [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]
            self._kernel(name, inputs, outputs or in_place)
        for tensor in outputs:
            self._allocated(tensor, "gathered" if name in ("all_gather_copy_in", "_allgather_base_") else "")
        return out

    def resized(self, store: torch.UntypedStorage) -> None:
        number = self.numbers.get(store._cdata)
        if number is not None:
            self.kinds[number] = "gathered"
            self._change(number, store.nbytes())

    def trace(self) -> Work:
        """Return what was recorded since the model was built, and the memory from the beginning."""
        totals = list(accumulate(change for _, change in self.changes))
        last = int(np.argmax(totals))
        peak: Counter[str] = Counter()
        for number, change in self.changes[: last + 1]:
            peak[self.kinds[number]] += change
        return Work(+self.kernels, self.collectives, +peak, self.resident)  # without those of building

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Set the kind of these tensors' storages."""
        for tensor in tensors:
            number = self.numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self.kinds[number] = kind

    def _allocated(self, tensor: Tensor, kind: str) -> None:
        store = tensor.untyped_storage()
        number = self.numbers.get(store._cdata)
        if number is None:
            number = self.numbers[store._cdata] = len(self.kinds)
            self.kinds.append(kind or {"build": "weights", "forward": "activations"}.get(self._phase(), "temporary"))
            weakref.finalize(store, self._freed, store._cdata, number)
            self.sizes[number] = 0
            self._change(number, store.nbytes())

    def _freed(self, address: int, number: int) -> None:
        del self.numbers[address]
        self._change(number, 0)
        del self.sizes[number]

    def _change(self, number: int, size: int) -> None:
        if size != self.sizes[number]:
            self.changes.append((number, size - self.sizes[number]))
            self.sizes[number] = size

    def _phase(self) -> Phase:
        """Return the phase, backward wherever autograd is running, recomputation included."""
        return "backward" if self.phase == "forward" and torch._C._current_graph_task_id() != -1 else self.phase

    def _kernel(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in [*inputs, *outputs])  # one changed in place is read and written
        kind: Literal["product", "attention", "memory"] = "memory"
        shape: tuple[int, ...] = ()
        flops = 0
        if name in PRODUCTS or name == GROUPED:
            left, right = inputs[:2] if name == GROUPED else inputs[-2:]
            batch = left.shape[0] if left.dim() == 3 else 1
            kind, shape = "product", (batch, left.shape[-2], right.shape[-1], left.shape[-1])
            flops = 2 * math.prod(shape)
        elif name.startswith(ATTENTION):
            first = 1 if "backward" in name else 0
            query, key = inputs[first : first + 2]
            kind, shape = "attention", (*query.shape[:3], key.shape[2], query.shape[3])
            products = 5 if first else 2  # backward computes the scores again, and four products more
            flops = 2 * products * math.prod(shape)
        dtype = str(outputs[0].dtype if outputs else inputs[0].dtype).removeprefix("torch.")
        if self.phase != "build":
            self.kernels[Kernel(name, kind, shape, dtype, flops, size, self._phase())] += 1

    def _collective(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        named = [arg for arg in args if isinstance(arg, str)]  # functional collectives: the reduction, the group
        boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject)]  # others: the group, the reduction
        axes, size = self.axes[named[-1] if named else dist.ProcessGroup.unbox(boxed[0]).group_name]
        largest = max(tensor.nbytes for tensor in tensors)
        if size > 1:
            self.collectives[Collective(COLLECTIVES[name], axes, size, largest, self._phase())] += 1


def step(config: Config, mesh: Mesh, recorder: Recorder, microbatches: int = 0, update_only: bool = False) -> None:
    """Build this rank's part of the model and run one step."""

    def allocate(model: Transformer, config: Config, device: torch.device) -> None:
        with recorder.running("build"):
            model.to_empty(device=device)

    model = build_model(config, mesh, allocate)
    for stage in model.stages.values():
        stage.traced_for_gpu = config.train.device != "cpu"
    plan = first_step(config, mesh.layout.dp)
    count = plan.num_microbatches(mesh.layout.dp)
    if microbatches:
        count = min(count, microbatches)
    with recorder.running("build"):
        engine = Engine(model, mesh, config.parallel)
        optimizer = make_optimizer(config.optimizer, engine.trained, engine.rows, table_of(config), Owners(mesh))
        recorder.mark(map(storage, optimizer.state().values()), "moments")
    if config.model.experts:
        chosen = plan.micro_batch * plan.length // (mesh.layout.cp * mesh.layout.tp) * config.model.experts_per_token
        recorder.load = chosen // config.model.experts
    with recorder.running("forward"):
        tokens = torch.zeros(plan.micro_batch, plan.length + 1, dtype=torch.int64)
        documents = tokens[:, 1:].int() if config.data.mask_documents else None
        batches = [Batch(tokens, documents, np.empty(0, np.int64))] * count
        loss = None if update_only else engine.forward_backward(batches, count, plan.tokens)
        recorder.phase = "update"
        grads = [*map(storage, engine.trained.values())] if update_only else engine.gradients()
        recorder.mark(grads, "gradients")
        torch._foreach_norm(grads, 2, torch.float64)
        optimizer.step(grads, plan)
        del loss, grads, batches, tokens
        engine.zero()


def _axes_of_groups(mesh: Mesh) -> dict[str, tuple[str, int]]:
    """Return the axes along which the ranks of each process group differ, and its size, by the group's name."""
    found = {dist.group.WORLD.group_name: ("world", dist.get_world_size())}  # type: ignore[union-attr]
    for axes in (SHARDS, EXPERT_SHARDS, ("cp", "tp"), WITHIN_REPLICA, *((axis,) for axis in AXES)):
        group = mesh.group(*axes)
        # of axes of one rank torch makes no group of its own, so that several names may mean the same
        found[group.group_name] = ("_".join(axis for axis in axes if mesh.group(axis).size() > 1), group.size())
    if mesh.embedding_group:
        found[mesh.embedding_group.group_name] = ("ends", 2)
    return found


def _is_free(op: Any, outputs: list[Tensor]) -> bool:
    """Return whether a call launches no kernel: a view, an allocation, a question about a tensor."""
    if op._schema.name.startswith(("prim::", "profiler::", "c10d", "_c10d")) or op.name() in FREE:
        return True
    if op._schema.name.startswith(("aten::empty", "aten::new_empty")):
        return True
    if not outputs:  # fused AdamW and the like only write to their arguments
        return not op._schema.is_mutable
    aliases = [returned.alias_info for returned in op._schema.returns]
    return all(alias is not None and not alias.is_write for alias in aliases)
