"""JSON between ranks. Messages of peers are parsed and never unpickled, so that they cannot carry code."""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.errors import Fault, UserError, in_one_line
from megahp.parallel.collectives import Group, gather_into

LARGEST = 2**28  # bytes of one rank's JSON; no real message comes near it, and a garbled size must not allocate more
T = TypeVar("T")
Kinds = Sequence[type[Exception]]


def all_gather_json(value: Any, group: Group | None = None) -> list[Any]:
    """Return every rank's value, in the order of the group's ranks."""
    return _broadcast(_gather(value, group), group)


def gather_results(work: Callable[[], Any], group: Group | None = None, kinds: Kinds = (UserError,)) -> list[Any]:
    """Call `work` on every rank and return all results on the group's rank 0, an empty list elsewhere.

    An error on one rank is raised on all, so that none waits for another in vain: with its own type if that is one of
    `kinds` (special ones first), else as a Fault.
    """
    outcome, cause = _try(work, group, kinds)
    outcomes = _gather(outcome, group)
    error = _broadcast(next((outcome["error"] for outcome in outcomes if "error" in outcome), None), group)
    if error:
        raise _decode_error(error, kinds) from cause
    return [outcome["value"] for outcome in outcomes]


def on_rank0(work: Callable[[], T], group: Group | None = None, kinds: Kinds = (UserError,)) -> T:
    """Call `work` on the group's rank 0 and return its result on all ranks; its error is raised on all, as by
    `gather_results`."""
    outcome, cause = _try(work, group, kinds) if dist.get_rank(group) == 0 else (None, None)
    outcome = _broadcast(outcome, group)
    if "error" in outcome:
        raise _decode_error(outcome["error"], kinds) from cause
    return outcome["value"]


def _try(work: Callable[[], Any], group: Group | None, kinds: Kinds) -> tuple[dict[str, Any], Exception | None]:
    """Return {"value": result} or {"error": [index in kinds or -1, message, may_pass]}, and the error itself."""
    try:
        return {"value": work()}, None
    except Exception as error:
        kind = next((index for index, kind in enumerate(kinds) if isinstance(error, kind)), -1)
        message = str(error) if kind >= 0 else f"rank {dist.get_rank(group)}: {in_one_line(error)}"
        return {"error": [kind, message, getattr(error, "may_pass", False)]}, error


def _decode_error(encoded: Sequence[Any], kinds: Kinds) -> Exception:
    kind, message, may_pass = encoded
    error = kinds[kind](message) if kind in range(len(kinds)) else Fault(message)
    if isinstance(error, UserError):
        error.may_pass = may_pass is True
    return error


def _gather(value: Any, group: Group | None) -> list[Any]:
    """Return every rank's value on the group's rank 0, an empty list elsewhere."""
    data = _encode(value)
    if dist.get_world_size(group) == 1:
        return [_decode(data, 0)]
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64)
    gather_into(sizes, torch.tensor([data.numel()]), group)
    padded = data.new_zeros(_checked(int(sizes.max())))  # gather wants tensors of one size
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in sizes] if dist.get_rank(group) == 0 else []
    dist.gather(padded, parts or None, group=group, group_dst=0)
    return [_decode(part[:size], rank) for rank, (part, size) in enumerate(zip(parts, sizes, strict=False))]


def _broadcast(value: Any, group: Group | None) -> Any:
    """Return the value of the group's rank 0."""
    is_rank0 = dist.get_rank(group) == 0
    data = _encode(value) if is_rank0 else torch.empty(0, dtype=torch.uint8)
    if dist.get_world_size(group) > 1:
        size = torch.tensor(data.numel())
        dist.broadcast(size, group=group, group_src=0)
        if not is_rank0:
            data = torch.empty(_checked(int(size)), dtype=torch.uint8)
        dist.broadcast(data, group=group, group_src=0)
    return _decode(data, 0)


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: Tensor, rank: int) -> Any:
    try:
        return json.loads(data.numpy().tobytes())
    except (ValueError, RecursionError):
        raise Fault(f"rank {rank} of its group sent invalid JSON; start all ranks with the same megahp") from None


def _checked(size: int) -> int:
    if not 0 < size <= LARGEST:
        raise Fault(f"a rank wants to send {size:,} bytes of JSON; {LARGEST:,} is the most")
    return size
