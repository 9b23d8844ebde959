"""The order in which a model reads the values of a series: SutraNets' sub-series, every K-th value each.

Source: SutraNets (NeurIPS 2023) and its code, huaweicloud/c2far_forecasting, branch sutranets.
"""

from typing import Literal, get_args

import numpy as np

Order = Literal["regular", "backfill", "regular-alternating", "backfill-alternating"]
ORDERS: tuple[Order, ...] = get_args(Order)


def permutation(length: int, sub_series: int, order: Order) -> np.ndarray:
    """Return the time of the value that is read at each place (int64 [length]).

    Sub-series k holds the values at times k, k + K, k + 2K, ... Regular orders read sub-series 0 first, backfill orders
    the last one first. An alternating order reads one value of every sub-series before the next of any; the others read
    a whole sub-series before the next. Regular and alternating is the order of time, and so is every order of one
    sub-series. `length` must be a multiple of `sub_series`.
    """
    times = np.arange(length).reshape(-1, sub_series)  # [steps, K]
    if order.startswith("backfill"):
        times = times[:, ::-1]
    return (times if order.endswith("alternating") else times.T).reshape(-1)


def window_order(conditioning: int, horizon: int, sub_series: int, order: Order) -> np.ndarray:
    """Return the time of the value at each place of a window (int64 [conditioning + horizon]): all that is given comes
    before all that is forecast, both parts in `order`, which K divides the horizon for.

    Where K does not divide the conditioning part, its first values, fewer than K, stay in the order of time.
    """
    first = conditioning % sub_series
    given = first + permutation(conditioning - first, sub_series, order)
    return np.concatenate((np.arange(first), given, conditioning + permutation(horizon, sub_series, order)))
