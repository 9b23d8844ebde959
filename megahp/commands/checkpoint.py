"""Checkpoints: what there is, whether it is whole, how two differ, and dropping some."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megahp.config import CheckpointConfig
from megahp.errors import UserError

if TYPE_CHECKING:
    from megahp.checkpoint import Location


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("ls", help="what a run has")
    listing.add_argument("run", type=_place, metavar="RUN", help="run directory, or its URL")
    listing.set_defaults(action=_list_checkpoints)

    several: dict[str, Any] = {"type": _place, "metavar": "CHECKPOINT"}
    verify = actions.add_parser("verify", help="read every byte, and compare it with what was written")
    verify.add_argument("checkpoints", nargs="+", help="or a run: then all of its; or a URL", **several)
    verify.set_defaults(action=_verify_checkpoints)

    diff = actions.add_parser("diff", help="how two differ: settings, progress, tensors")
    diff.add_argument("checkpoints", nargs=2, help="or a run: then its newest; or a URL", **several)
    diff.set_defaults(action=_compare_checkpoints)

    prune = actions.add_parser("prune", help="drop what need not be kept")
    prune.add_argument("run", type=_place, metavar="RUN", help="run directory, or its URL")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="how many of the newest stay")
    prune.add_argument("--keep-every", type=int, default=0, metavar="STEPS", help="those at every so many steps too")
    prune.add_argument("--keep-best", action="store_true", help="that of least validation loss too")
    prune.set_defaults(action=_prune_checkpoints)


def run(options: Namespace, words: Sequence[str]) -> int:
    return options.action(options)


def _list_checkpoints(options: Namespace) -> int:
    from megahp.checkpoint.inspect import listing

    print("\n".join(listing(_checkpoints_of(options.run))))
    return 0


def _verify_checkpoints(options: Namespace) -> int:
    from megahp.checkpoint import complete, folder_of, is_checkpoint, none_in, problems

    found, all_of = 0, {}
    for named in options.checkpoints:
        all_of[named] = [named] if is_checkpoint(named) else complete(folder_of(named))
        if not all_of[named]:
            raise UserError(f"{named} {none_in(named)}")
    for checkpoints in all_of.values():
        for checkpoint in checkpoints:
            wrong = problems(checkpoint)
            found += len(wrong)
            print("\n".join(f"{checkpoint}: {problem}" for problem in wrong) or f"{checkpoint}: as it was written")
    return 1 if found else 0


def _compare_checkpoints(options: Namespace) -> int:
    from megahp.checkpoint import find
    from megahp.checkpoint.inspect import differences

    found = 0
    for line in differences(*map(find, options.checkpoints)):
        print(line)
        found = 1
    return found


def _prune_checkpoints(options: Namespace) -> int:
    from megahp.checkpoint import latest, problems, remove, superseded

    if options.keep < 1 or options.keep_every < 0:
        raise UserError(f"--keep {options.keep} must be at least 1, and --keep-every {options.keep_every} at least 0")
    folder = _checkpoints_of(options.run)
    keep = CheckpointConfig(keep=options.keep, keep_every=options.keep_every, keep_best=options.keep_best)
    newest = latest(folder)
    if newest and (wrong := problems(newest)):
        raise UserError(f"{newest} is damaged ({wrong[0]}), and older ones may have to serve; nothing is dropped")
    for checkpoint in superseded(folder, newest, keep) if newest else []:
        remove(checkpoint)
        print(f"{checkpoint} dropped")
    return 0


def _checkpoints_of(run: "Location") -> "Location":
    from megahp.checkpoint import complete, folder_of, is_checkpoint, none_in

    if is_checkpoint(run):
        raise UserError(f"{run} is a checkpoint; name its run directory, two folders above")
    if not complete(folder := folder_of(run)):
        raise UserError(f"{run} {none_in(run)}")
    return folder


def _place(name: str) -> "Location":
    from megahp.checkpoint import location

    try:
        return location(name)
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None
