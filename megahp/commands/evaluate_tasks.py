"""Evaluate a trained run with lm-evaluation-harness, on tasks in local files. Needs the package lm-eval.

    megahp evaluate-tasks runs/first my_tasks/ [--tasks NAME ...] [--fewshot N] [--limit N] [--json FILE]

FOLDER has tasks in the harness's format: YAML files, with the data as a local file (dataset_path: json, dataset_kwargs:
{data_files: ...}). You see the harness's table. Nothing is downloaded, unless HF_HUB_OFFLINE=0 is set; the harness's
own tasks, such as those in lm_eval/tasks/arc, can be a FOLDER if their data is cached. Start it where the run was
started, since its tokenizer may have a relative path. Exit code 2: invalid input.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megahp.commands.arguments import check_minimum
from megahp.commands.output import write_json
from megahp.errors import UserError
from megahp.evaluate.sample import load_trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="or a run directory: its newest")
    add("folder", type=Path, metavar="FOLDER", help="with the tasks' YAML files")
    add("--tasks", nargs="+", metavar="NAME", help="tasks, groups or tags of it (default: all tasks)")
    add("--fewshot", type=int, metavar="N", help="examples before a question (default: the task's)")
    add("--limit", type=int, metavar="N", help="questions per task, for a quick test")
    add("--json", type=Path, metavar="FILE", help="also write the results here")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before lm_eval imports datasets, which reads it
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from megahp.evaluate.harness import Harness
    except ImportError as error:
        raise UserError(f"tasks need the package lm-eval ({error}): pip install lm-eval") from None
    check_minimum(arguments, limit=1, fewshot=0)
    manager = TaskManager(include_path=str(arguments.folder), include_defaults=False)
    known = manager.all_tasks
    if not known:
        raise UserError(f"{arguments.folder} holds no tasks; name a folder with YAML files of lm-evaluation-harness")
    for name in arguments.tasks or ():
        if name not in known:
            raise UserError(f"--tasks {name} is not in {arguments.folder}; choose from {', '.join(known)}")
    trained = load_trained(arguments.checkpoint)
    results = simple_evaluate(
        Harness(trained),
        tasks=arguments.tasks or manager.all_subtasks,
        num_fewshot=arguments.fewshot,
        limit=arguments.limit,
        log_samples=False,
        task_manager=manager,
    )
    print(f"{trained.path}\n{make_table(results)}")
    if arguments.json:
        kept = {key: results[key] for key in ("results", "n-shot", "n-samples")}
        write_json(arguments.json, {"checkpoint": str(trained.path), **kept})
    return 0
