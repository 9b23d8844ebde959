"""The pipeline schedules as lists of actions, those that torch.distributed.pipelining runs, and their replay."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from megahp.config import ParallelConfig


class Action(NamedTuple):
    """What a rank does next: F forward, B backward, or under zero-bubble schedules I, the gradient of the input alone,
    and W, later, that of the weights."""

    kind: str
    stage: int
    microbatch: int


def rank_actions(rank: int, parallel: ParallelConfig, microbatches: int) -> list[Action]:
    """Return the actions of a pipeline rank, in order."""
    rule = {"1f1b": _one_forward_one_backward, "zbv": _v_shaped}.get(parallel.schedule, _interleaved)
    return rule(rank, parallel, microbatches)


@lru_cache(maxsize=256)
def actions(parallel: ParallelConfig, microbatches: int) -> list[list[Action]]:
    """Return the actions of each pipeline rank."""
    return [rank_actions(rank, parallel, microbatches) for rank in range(parallel.pp)]


def steady(parallel: ParallelConfig, microbatches: int) -> tuple[int, int]:
    """Return two smaller numbers of microbatches, a round apart, that say by a straight line what many take, since
    rounds are alike once the pipeline is full; twice the same number where there are few."""
    round_ = parallel.pp
    few = 2 * round_ + microbatches % round_
    if microbatches <= few + round_ or (parallel.schedule != "1f1b" and microbatches % round_):
        return microbatches, microbatches
    return few, few + round_


def replay(
    lists: Sequence[Sequence[Action]], seconds: Callable[[Action], float], transfer: Callable[[int, int], float]
) -> float:
    """Return when the last rank ends, in seconds.

    An action begins once its rank has ended the one before and its input has come: the stream of the stage before, or
    the gradient of the stage after. seconds: of an action; transfer: from one rank to another.
    """
    rank_of = {action.stage: rank for rank, each in enumerate(lists) for action in each}
    last = max(rank_of)
    ended: dict[tuple[str, int, int], float] = {}
    clocks, following = [0.0] * len(lists), [0] * len(lists)
    waiting: dict[tuple[str, int, int], int] = {}  # an output -> the rank that waits for it
    ready = list(range(len(lists)))
    while ready:
        rank = ready.pop()
        for action in lists[rank][following[rank] :]:
            kind, stage, microbatch = action
            start = clocks[rank]
            if kind == "F" and stage or kind in "BI" and stage < last:
                needs = ("F", stage - 1, microbatch) if kind == "F" else ("B", stage + 1, microbatch)
                if needs not in ended:
                    waiting[needs] = rank
                    break
                start = max(start, ended[needs] + transfer(rank_of[needs[1]], rank))
            following[rank] += 1
            output = ("B" if kind == "I" else kind, stage, microbatch)
            ended[output] = clocks[rank] = start + seconds(action)
            if output in waiting:
                ready.append(waiting.pop(output))
    if waiting:
        raise RuntimeError(f"a pipeline schedule waits for itself: {sorted(waiting)[0]}")
    return max(clocks)


def _one_forward_one_backward(rank: int, parallel: ParallelConfig, microbatches: int) -> list[Action]:
    """Return 1F1B of one stage a rank: as many forwards as stages follow, then backwards and forwards in turn."""
    ahead = min(microbatches, parallel.pp - rank)
    order = [Action("F", rank, number) for number in range(ahead)]
    for number in range(microbatches):
        order.append(Action("B", rank, number))
        if ahead + number < microbatches:
            order.append(Action("F", rank, ahead + number))
    return order


def _interleaved(rank: int, parallel: ParallelConfig, microbatches: int) -> list[Action]:
    """Return interleaved 1F1B of several stages a rank (Narayanan et al., arXiv 2104.04473), or with zero-bubble its
    ZB1P variant (Qi et al., arXiv 2401.10241), which puts the weights' gradients off by as many microbatches as ranks
    are before this one."""
    local, pp, split = parallel.local_stages, parallel.pp, parallel.schedule == "zero-bubble"
    per_round = microbatches // max(1, microbatches // pp)
    total = local * microbatches
    ahead = min(total, (local - 1) * per_round + (1 if split else 2) * (pp - 1 - rank))

    def nth(kind: str, number: int) -> Action:
        """Rounds of `per_round` microbatches go through all stages of the rank, forward ones first to last."""
        turn, position = divmod(number, local * per_round)
        step, microbatch = divmod(position, per_round)
        stage = (step if kind == "F" else local - 1 - step) * pp + rank
        return Action(kind, stage, turn * per_round + microbatch)

    order = [nth("F", number) for number in range(ahead)]
    for number in range(total):
        if ahead + number < total:
            order.append(nth("F", ahead + number))
        order.append(nth("I" if split else "B", number))
        if split and number >= rank:
            order.append(nth("B", number - rank)._replace(kind="W"))
    if split:
        order += [nth("B", number)._replace(kind="W") for number in range(max(0, total - rank), total)]
    return order


def _v_shaped(rank: int, parallel: ParallelConfig, microbatches: int) -> list[Action]:
    """Return ZB-V (Qi et al., arXiv 2401.10241, section 6) of two stages a rank, one on the way down, one back up."""
    pp = parallel.pp
    down, up = rank, 2 * pp - 1 - rank
    most = max(2 * pp - 1, microbatches)
    done = {(kind, stage): 0 for kind in "FIW" for stage in (down, up)}
    order: list[Action] = []

    def add(*words: tuple[str, int]) -> None:
        for kind, stage in words:
            order.append(Action(kind, stage, done[kind, stage]))
            done[kind, stage] += 1

    for _ in range(2 * (pp - rank) - 1):
        add(("F", down))
    for _ in range(rank):
        add(("F", up), ("F", down))
    for _ in range(pp - rank):
        add(("F", up), ("I", up), ("W", up))
    while done["F", up] < done["F", down] or done["F", down] < most:
        if done["F", down] < most:
            add(("F", down))
        add(("I", down), ("W", down), ("F", up), ("I", up), ("W", up))
    for _ in range(rank):
        add(("I", down), ("I", up))
    for _ in range(pp - rank):
        add(("I", down), ("W", down))
    for stage in (up, down):
        while done["W", stage] < done["I", stage]:
            add(("W", stage))
    return [action for action in order if action.microbatch < microbatches]
