"""Time against compute at a target loss, as Power Lines reads it: each size has its D_min; from there a larger batch
buys fewer steps with more data. (arXiv 2505.13738; secondary source)"""

from dataclasses import dataclass

import numpy as np

from megahp.scaling.laws import LossLaw, PowerLaw


@dataclass(frozen=True)
class Frontier:
    """Runs of one loss of which none is beaten in both compute and time, by ascending compute; [n] each."""

    compute: np.ndarray  # 6 N D, FLOPs
    time: np.ndarray  # N steps: of a cluster that holds any batch
    parameters: np.ndarray
    tokens: np.ndarray
    batch: np.ndarray  # tokens


def frontier(target: float, loss: LossLaw, critical: PowerLaw, points: int = 400) -> Frontier:
    """Of a grid of sizes and batches. target: above the law's floor."""
    least = (loss.a / (target - loss.floor)) ** (1 / loss.alpha)  # the size that needs endless data
    n = least * np.geomspace(1.01, 1e3, points)[:, None]
    d_min = (loss.b / (target - loss.floor - loss.a / n**loss.alpha)) ** (1 / loss.beta)
    share = np.geomspace(1e-2, 10, points)[None, :]  # B / B_crit; ten times it leaves a tenth of the time to win
    batch, d = share * critical.scale * d_min**critical.exponent, d_min * (1 + share)
    compute, time, n, d, batch = (x.ravel() for x in np.broadcast_arrays(6 * n * d, n * d / batch, n, d, batch))
    order = np.lexsort((time, compute))
    soonest = np.minimum.accumulate(time[order])
    kept = order[np.append(True, soonest[1:] < soonest[:-1])]
    return Frontier(compute[kept], time[kept], n[kept], d[kept], batch[kept])
