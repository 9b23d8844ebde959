"""Tests mirror the rooms: megahp/a/b.py is tested in tests/a/test_b.py, or, where a test spans several, as here."""

from __future__ import annotations

from pathlib import Path

import megahp

PACKAGE, TESTS = Path(megahp.__file__).parent, Path(__file__).parent
# Test -> the modules that it covers, beside that of its own place.
SPANNED = {
    "checkpoint/test_store.py": "checkpoint/shards checkpoint/inspect commands/checkpoint",
    "commands/test_benchmark_training.py": "benchmark/machine commands/benchmark_loss",
    "commands/test_chain.py": "commands/launch commands/segment",
    "commands/test_convert.py": "convert/run_directory convert/sidecar",
    "commands/test_preprocess.py": "commands/merge data/texts",
    "commands/test_preprocess_series.py": "series/tokenizer",
    "commands/test_runs.py": "commands/status",
    "commands/test_transfer_sweep.py": "commands/arguments diagnose/curves",
    "data/test_samples.py": "data/cache",
    "diagnose/test_verify.py": "commands/verify_layout",
    "distributed/test_layouts.py": "model/build model/mlp parallel/data parallel/mesh parallel/tensor "
    "train/trainer train/validation",
    "distributed/test_sabotage.py": "parallel/collectives parallel/expert parallel/parameters",
    "evaluate/test_forecast.py": "commands/forecast",
    "evaluate/test_perplexity.py": "commands/evaluate commands/evaluate_tasks evaluate/sample",
    "faults/test_faults.py": "faults/copies faults/notice launch/processes",
    "faults/test_soak.py": "faults/crash",
    "model/test_transformer.py": "parallel/draw",
    "ops/test_norm.py": "model/norm commands/benchmark_norm",
    "parallel/test_cross_entropy.py": "ops/compiler parallel/logits",
    "parallel/test_pipeline.py": "parallel/stages",
    "plan/test_formulas.py": "plan/peak plan/rank plan/work",
    "plan/test_search.py": "plan/text",
    "plan/test_validation.py": "plan/calibration plan/published",
    "recipe/test_rows.py": "recipe/text scaling/laws",
    "report/test_page.py": "commands/report",
    "scaling/batch/test_scheduler.py": "scaling/batch/policies/constant scaling/batch/policies/policy",
    "slurm/test_jobs.py": "commands/requeue",
    "test_bad_input.py": "commands/config commands/sample errors exit_codes",
    "test_cli.py": "__main__",
    "train/test_masks.py": "parallel/selection",
    "train/test_run.py": "commands/replay commands/train log/events log/replay train/loop train/reporter",
}


def test_every_module_has_its_tests() -> None:
    covered = {f"{module}.py" for modules in SPANNED.values() for module in modules.split()}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE)
        mirrored = (TESTS / module.parent / f"test_{module.name}").exists()
        if module.name != "__init__.py":
            assert mirrored != (str(module) in covered), (
                f"{module}: tests/{module.parent}/test_{module.name}, or SPANNED"
            )


def test_every_place_that_is_named_is_there() -> None:
    assert [test for test in SPANNED if not (TESTS / test).exists()] == []
    modules = {module for modules in SPANNED.values() for module in modules.split()}
    assert [module for module in modules if not (PACKAGE / f"{module}.py").exists()] == []
