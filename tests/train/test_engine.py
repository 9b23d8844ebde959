"""Loss scaling and clipping, a step's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import world
from distributed.training import Training, settings_of

from megahp.train.engine import LossScale, clip


def half_precision() -> dict[str, Any]:
    """One step in each type, without and with a scale; and one that overflows."""
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        for scale in (1.0, 1024.0):
            training = Training(settings_of("llama", f"train.dtype={dtype}"))
            plan = training.batch_scheduler.step(training.progress)
            assert plan
            batches = list(training.batches(plan))
            loss = training.engine.forward_backward(batches, len(batches), plan.tokens, scale)
            grads = training.engine.gradients()
            measured = training.engine.measure(loss, grads, plan.global_batch, scale)
            clip(grads, measured.grad_norm, 0.5, scale)
            found[dtype, scale] = vars(measured), [grad.clone() for grad in grads]
    training.engine.zero()
    loss = training.engine.forward_backward(batches, len(batches), plan.tokens, 2.0**40)
    found["overflow"] = training.engine.measure(loss, training.engine.gradients(), plan.global_batch, 2.0**40).finite
    return found


def test_the_loss_scale_leaves_no_trace_but_precision() -> None:
    found = world.run_afresh(1, half_precision)[0]
    plain, plain_grads = found["float32", 1.0]
    for (dtype, scale), (measured, grads) in ((key, value) for key, value in found.items() if key != "overflow"):
        rtol = {"float32": 1e-6, "bfloat16": 0.05, "float16": 0.01}[dtype]
        assert measured["loss"] == pytest.approx(plain["loss"], rel=rtol / 4)
        assert measured["grad_norm"] == pytest.approx(plain["grad_norm"], rel=rtol)
        for key in ("grad_sq_example", "grad_sq_batch"):
            assert sum(measured[key].values()) == pytest.approx(sum(plain[key].values()), rel=2 * rtol), (dtype, scale)
        for grad, wanted in zip(grads, plain_grads, strict=True):
            assert (grad - wanted).norm() <= 3 * rtol * wanted.norm(), (dtype, scale)
    assert found["overflow"] is False


def test_the_loss_scale_halves_and_doubles() -> None:
    scale = LossScale(1024.0)
    seen = []
    for step in range(4100):
        scale.update(finite=step not in (5, 6))
        seen.append(scale.value)
    assert seen[4:8] == [1024, 512, 256, 256]
    assert (seen[2005], seen[2006], seen[4005], seen[4006]) == (256, 512, 512, 1024)


def test_clip_takes_the_scale_out() -> None:
    for norm, largest, expected in ((2.0, 1.0, 0.5), (0.5, 1.0, 1.0), (9.0, 0.0, 1.0)):
        grads = [torch.full((3,), 8.0)]
        clip(grads, norm, largest, scale=8.0)
        assert grads[0].tolist() == [expected] * 3
