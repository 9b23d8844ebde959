"""lm-evaluation-harness on a trained run, on tasks whose files lie on this machine. Needs the package lm-eval.

    megahp evaluate-tasks runs/first my_tasks/ [--tasks NAME ...] [--fewshot N] [--limit N] [--json FILE]

FOLDER holds tasks as the harness knows them: YAML files, with the data as a local file (dataset_path: json,
dataset_kwargs: {data_files: ...}). Nothing is fetched from the network, unless HF_HUB_OFFLINE=0 is set; the harness's
own tasks, such as those in lm_eval/tasks/arc, serve as a FOLDER where their data is in the cache. Start it where the
run was started, since its tokenizer may be named from there. Exit code 2 means a mistake in what was given.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from megahp.commands.arguments import check_minimum
from megahp.errors import UserError
from megahp.evaluate.sample import trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="or a run directory: its newest one")
    add("folder", type=Path, metavar="FOLDER", help="with the tasks' YAML files")
    add("--tasks", nargs="+", metavar="NAME", help="tasks, groups or tags of it (default: all tasks)")
    add("--fewshot", type=int, metavar="N", help="examples before a question (default: the task's)")
    add("--limit", type=int, metavar="N", help="of a task's questions, for a try")
    add("--json", type=Path, metavar="FILE", help="write the results here too")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from megahp.evaluate.harness import Harness
    except ImportError as error:
        raise UserError(f"tasks need the package lm-eval ({error}): pip install lm-eval") from None
    check_minimum(arguments, limit=1, fewshot=0)
    manager = TaskManager(include_path=str(arguments.folder), include_defaults=False)
    there = manager.all_tasks
    if not there:
        raise UserError(f"{arguments.folder} holds no tasks; name a folder with YAML files of lm-evaluation-harness")
    for name in arguments.tasks or ():
        if name not in there:
            has = f"{arguments.folder}, which has {', '.join(there)}"
            raise UserError(f"--tasks {name} is not in {has}; choose of these")
    origin = trained(arguments.checkpoint)
    found = simple_evaluate(
        Harness(origin),
        tasks=arguments.tasks or manager.all_subtasks,
        num_fewshot=arguments.fewshot,
        limit=arguments.limit,
        log_samples=False,
        task_manager=manager,
    )
    print(f"{origin.path}\n{make_table(found)}")
    if arguments.json:
        told = {"checkpoint": str(origin.path), **{key: found[key] for key in ("results", "n-shot", "n-samples")}}
        arguments.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0
