"""Other people's rules at published points."""

from __future__ import annotations

import pytest

from megahp.config import resolve
from megahp.recipe.hyperparameter_laws import deepseek, nanochat, olmo_ladder, step_law
from megahp.scaling.flops import training_flops


@pytest.mark.parametrize(
    ("size", "lr", "batch"),
    [
        ((6e7, 1e9), 2.951e-3, 79_878),
        ((4.29e8, 5e10), 2.413e-3, 745_658),
        ((1e9, 1e11), 1.6325e-3, 1_107_715),
        ((7e9, 1.4e12), 9.1656e-4, 4_998_815),
    ],
)
def test_step_law(size: tuple[float, float], lr: float, batch: float) -> None:
    """Check 30."""
    found = step_law(*size)
    assert (found.lr, found.batch) == pytest.approx((lr, batch), rel=1e-3)
    assert bool(found.outside) == (size[0] > 1e9)


@pytest.mark.parametrize(
    ("flops", "lr", "batch"), [(1e19, 1.3148e-3, 478_942), (1e20, 9.8600e-4, 1_017_145), (1e21, 7.3939e-4, 2_160_145)]
)
def test_deepseek(flops: float, lr: float, batch: float) -> None:
    found = deepseek(flops)
    assert (found.lr, found.batch) == pytest.approx((lr, batch), rel=1e-4)
    assert bool(found.outside) == (flops > 2e19)


def test_deepseeks_operations_a_token_are_72_l_d_d_and_12_l_d_s() -> None:
    words = {"layers": 3, "width": 256, "heads": 4, "mlp_width": 1024, "activation": "gelu", "vocab_size": 512}
    model = resolve.from_dict({"model": words}, "test").model
    counted = training_flops(model, 1024, causal=False) - 6 * 256 * 512
    assert counted == 72 * 3 * 256**2 + 12 * 3 * 256 * 1024


def test_nanochat_at_its_reference_and_beyond() -> None:
    reference = 12 * 110.1e6
    found = nanochat(reference)
    assert (found.lr, found.batch, found.weight_decay) == (0.02, 2**19, 0.28)
    large = nanochat(8 * reference)  # 8^0.383 = 2.2: the next power of two
    assert large.batch == 2**20 and large.lr == pytest.approx(0.02 * 2**0.5)
    kept = [each.batch / (each.lr * each.weight_decay * d) for each, d in ((found, 1), (large, 8))]
    assert kept[0] == pytest.approx(kept[1])


def test_olmos_ladder() -> None:
    small, large = olmo_ladder(108e6), olmo_ladder(8 * 108e6)
    assert (small.lr, small.batch, small.beta2) == (0.00235, 327_680, 0.99)
    assert (large.lr, large.batch, large.beta2) == (pytest.approx(0.00235 / 2), pytest.approx(4 * 327_680), 0.95)
