"""Where a run begins: at its newest sound checkpoint, at another run's, or at the beginning."""

from collections.abc import Sequence

from megahp import checkpoint
from megahp.errors import UserError
from megahp.train.reporter import Reporter
from megahp.train.run import Restored, Run, broadcast_from_rank0


def start(run: Run, reporter: Reporter, resume: bool) -> None:
    """Begin at the newest checkpoint if resuming and there is one, else where train.start_from says, else at the
    beginning."""
    found = broadcast_from_rank0(lambda: checkpoints_to_start_from(run, resume))
    if found is None:
        reporter.began(
            "started",
            f"a new run of {run.engine.model.parameters:,} parameters",
            run,
            Restored(None, run.batch_scheduler.state()),
        )
        return
    event, paths = found[0], [checkpoint.location(path) for path in found[1]]
    path, taken, refused = go_back(run, paths) if event == "resumed" else (paths[0], run.branch(paths[0]), [])
    anew = f"; {', '.join(taken.anew)} read from the beginning" if taken.anew else ""
    reporter.began(event, f"from {path}{anew}", run, taken)
    for why in refused:
        reporter.event("refused", why, run.progress)
    for change in taken.changes:
        reporter.event("batch", change.reason, run.progress, **change.to_dict())


def go_back(run: Run, newest_first: Sequence[checkpoint.Location]) -> tuple[checkpoint.Location, Restored, list[str]]:
    """Restore the newest checkpoint that is as it was written. Returns it, what was taken over, and why newer ones were
    refused. Raises UserError when there is none."""
    refused: list[str] = []
    for path in newest_first:
        try:
            return path, run.restore(path), refused
        except checkpoint.DamagedError as error:
            refused.append(str(error))
    raise UserError("; ".join(refused))


def checkpoints_to_start_from(run: Run, resume: bool) -> tuple[str, list[str]] | None:
    """The event a start is, and the checkpoints that serve, the best first. Raises UserError."""
    if resume and (own := checkpoint.candidates(run.folder, run.config.checkpoint.remote)):
        return "resumed", list(map(checkpoint.url_of, own))
    origin = run.config.train.start_from
    return ("branched", [checkpoint.url_of(checkpoint.find(checkpoint.location(origin)))]) if origin else None
