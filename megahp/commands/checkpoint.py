"""List, verify, compare and delete checkpoints."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megahp.config import CheckpointConfig
from megahp.errors import UserError

if TYPE_CHECKING:
    from megahp.checkpoint import Location


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("ls", help="list the checkpoints of a run")
    listing.add_argument("run", type=_location, metavar="RUN", help="run directory, or its URL")
    listing.set_defaults(action=_list_checkpoints)

    several: dict[str, Any] = {"type": _location, "metavar": "CHECKPOINT"}
    verify = actions.add_parser("verify", help="read every byte, and compare it with its checksum")
    verify.add_argument("checkpoints", nargs="+", help="or a run, for all of its checkpoints; or a URL", **several)
    verify.set_defaults(action=_verify_checkpoints)

    diff = actions.add_parser("diff", help="compare two: settings, progress, tensors")
    diff.add_argument("checkpoints", nargs=2, help="or a run, for its newest checkpoint; or a URL", **several)
    diff.set_defaults(action=_compare_checkpoints)

    prune = actions.add_parser("prune", help="delete old checkpoints")
    prune.add_argument("run", type=_location, metavar="RUN", help="run directory, or its URL")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="keep the newest N")
    prune.add_argument(
        "--keep-every", type=int, default=0, metavar="STEPS", help="keep those at multiples of STEPS too"
    )
    prune.add_argument("--keep-best", action="store_true", help="keep the one of least validation loss too")
    prune.set_defaults(action=_prune_checkpoints)


def run(options: Namespace, words: Sequence[str]) -> int:
    return options.action(options)


def _list_checkpoints(options: Namespace) -> int:
    from megahp.checkpoint.inspect import listing

    print("\n".join(listing(_checkpoints_of(options.run))))
    return 0


def _verify_checkpoints(options: Namespace) -> int:
    from megahp.checkpoint import complete, folder_of, is_checkpoint, none_in, problems

    checkpoints = []
    for named in options.checkpoints:  # all names are checked before a byte is read
        inside = [named] if is_checkpoint(named) else complete(folder_of(named))
        if not inside:
            raise UserError(f"{named} {none_in(named)}")
        checkpoints += inside
    code = 0
    for checkpoint in dict.fromkeys(checkpoints):
        damage = problems(checkpoint)
        print("\n".join(f"{checkpoint}: {problem}" for problem in damage) or f"{checkpoint}: as it was written")
        code = 1 if damage else code
    return code


def _compare_checkpoints(options: Namespace) -> int:
    from megahp.checkpoint import find
    from megahp.checkpoint.inspect import differences

    code = 0
    for line in differences(*map(find, options.checkpoints)):
        print(line)
        code = 1
    return code


def _prune_checkpoints(options: Namespace) -> int:
    from megahp.checkpoint import complete, latest, problems, remove, superseded, validation_loss_of

    if options.keep < 1 or options.keep_every < 0:
        raise UserError(f"--keep {options.keep} must be at least 1, and --keep-every {options.keep_every} at least 0")
    folder = _checkpoints_of(options.run)
    keep = CheckpointConfig(keep=options.keep, keep_every=options.keep_every, keep_best=options.keep_best)
    newest = latest(folder)
    # Deleting older ones could leave a run with a damaged checkpoint only.
    if newest and (damage := problems(newest)):
        raise UserError(f"{newest} is damaged ({damage[0]}), so an older one may be needed; nothing was deleted")
    if options.keep_best and all(validation_loss_of(each) is None for each in complete(folder)):
        raise UserError(f"--keep-best: no checkpoint in {folder} has a validation loss; leave it out")
    for checkpoint in superseded(folder, newest, keep) if newest else []:
        remove(checkpoint)
        print(f"{checkpoint} deleted")
    return 0


def _checkpoints_of(run: "Location") -> "Location":
    from megahp.checkpoint import complete, folder_of, is_checkpoint, none_in

    if is_checkpoint(run):
        raise UserError(f"{run} is a checkpoint; name its run directory, two folders above")
    if not complete(folder := folder_of(run)):
        raise UserError(f"{run} {none_in(run)}")
    return folder


def _location(name: str) -> "Location":
    from megahp.checkpoint import location

    try:
        return location(name)
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None
