"""Trade time against compute at a target loss: a size has a D_min, and a larger batch takes fewer steps on more data.

(Power Lines, arXiv 2505.13738; a secondary source)
"""

from dataclasses import dataclass

import numpy as np

from megahp.scaling.laws import LossLaw, PowerLaw


@dataclass(frozen=True)
class Frontier:
    """The runs that reach one loss and that no other beats in both compute and time; [n] each, compute ascending."""

    compute: np.ndarray  # 6 N D, FLOPs
    time: np.ndarray  # N x steps, proportional to time on a cluster large enough for any batch
    parameters: np.ndarray
    tokens: np.ndarray
    batch: np.ndarray  # tokens


def frontier(target: float, loss: LossLaw, critical: PowerLaw, points: int = 400) -> Frontier:
    """Return the Pareto frontier of a grid of sizes and batches. target: a loss above the law's floor."""
    least = (loss.a / (target - loss.floor)) ** (1 / loss.alpha)  # this size would need infinite data
    n = least * np.geomspace(1.01, 1e3, points)[:, None]
    d_min = (loss.b / (target - loss.floor - loss.a / n**loss.alpha)) ** (1 / loss.beta)
    share = np.geomspace(1e-2, 10, points)[None, :]  # B / B_crit; beyond 10 at most a tenth of the time is left to save
    batch, d = share * critical.scale * d_min**critical.exponent, d_min * (1 + share)
    compute, time, n, d, batch = (x.ravel() for x in np.broadcast_arrays(6 * n * d, n * d / batch, n, d, batch))
    order = np.lexsort((time, compute))  # a run is on the frontier if it is faster than all of less compute
    fastest = np.minimum.accumulate(time[order])
    kept = order[np.append(True, fastest[1:] < fastest[:-1])]
    return Frontier(compute[kept], time[kept], n[kept], d[kept], batch[kept])
