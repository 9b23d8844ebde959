"""Learning-rate schedules over tokens, and what one means for AdamW read as an average of its updates."""

import math

import numpy as np

from megahp.config import ScheduleConfig


def fraction(schedule: ScheduleConfig, tokens: float, horizon: float) -> float:
    """Return the fraction of the peak learning rate after `tokens` of `horizon` tokens: a linear warm-up from 0, then
    the schedule.

    decay-to-zero falls linearly to exactly 0 (D2Z, arXiv 2502.15938); linear and cosine to their floor; wsd stays at 1
    and decays at the end (MiniCPM, arXiv 2404.06395, with Megatron-LM's shapes); inverse-sqrt is
    sqrt(warm-up / tokens). A schedule with a start covers the tokens from there to the horizon.
    """
    tokens, horizon = max(0.0, tokens - schedule.start), horizon - schedule.start
    warmup = schedule.warmup * horizon
    if tokens < warmup:
        return tokens / warmup
    done = min(1.0, (tokens - warmup) / (horizon - warmup)) if horizon > warmup else 1.0
    match schedule.name:
        case "decay-to-zero":
            return 1 - done
        case "linear":
            return schedule.floor + (1 - schedule.floor) * (1 - done)
        case "cosine":
            return schedule.floor + (1 - schedule.floor) * _cosine(done)
        case "wsd":
            return schedule.floor + (1 - schedule.floor) * _decay(schedule, tokens, horizon)
        case "inverse-sqrt":
            return math.sqrt(warmup / tokens)
        case "constant":
            return 1.0


def _decay(schedule: ScheduleConfig, tokens: float, horizon: float) -> float:
    """Return wsd's decay: 1 where it begins, 0 at the horizon."""
    length = schedule.decay * horizon
    done = min(1.0, max(0.0, (tokens - (horizon - length)) / length)) if length else float(tokens >= horizon)
    match schedule.shape:
        case "linear":
            return 1 - done
        case "cosine":
            return _cosine(done)
        case "exponential":
            return 2 * 0.5**done - 1
        case "minus-sqrt":
            return 1 - math.sqrt(done)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def dual_coefficients(lr: np.ndarray, weight_decay: np.ndarray) -> tuple[float, np.ndarray]:
    """Return AdamW's coefficients as an exponential average of its updates: (first, c [T]), which add up to 1.

    The weights after T steps are `first` times the initial ones plus the sum over steps i of c_i x_i, with
    x_i = -m_i / (lambda_i (sqrt(v_i) + eps)) the update of step i; c_i = alpha_i prod_{j > i} (1 - alpha_j), alpha = lr
    weight_decay (D2Z, arXiv 2502.15938, section 3). lr, weight_decay: [T], those applied at each step.
    """
    alpha = np.asarray(lr, dtype=np.float64) * np.asarray(weight_decay, dtype=np.float64)
    kept = np.append(np.cumprod((1 - alpha)[::-1])[::-1], 1.0)
    return float(kept[0]), alpha * kept[1:]
