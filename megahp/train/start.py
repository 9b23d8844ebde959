"""Where training starts: at the run's newest valid checkpoint, at another run's, or from scratch."""

from collections.abc import Sequence

from megahp import checkpoint
from megahp.errors import UserError
from megahp.train.reporter import Reporter
from megahp.train.run import Restored, Run, broadcast_from_rank0


def start(run: Run, reporter: Reporter, resume: bool) -> bool:
    """Start at the run's newest checkpoint if resuming and there is one, else at train.start_from, else from scratch,
    and log it. Returns whether the run is new, rather than resumed."""
    event, paths = broadcast_from_rank0(lambda: checkpoints_to_start_from(run, resume))
    if event == "started":
        reason = f"a new run of {run.engine.model.parameters:,} parameters"
        reporter.start(event, reason, run, Restored(None, run.batch_scheduler.state()))
        return True
    newest_first = [checkpoint.location(path) for path in paths]
    refused: list[str] = []
    if event == "resumed":
        path, restored, refused = restore_newest(run, newest_first)
    else:
        path, restored = newest_first[0], run.branch(newest_first[0])
    sources = f"; {', '.join(restored.restarted_sources)} read from the beginning" if restored.restarted_sources else ""
    reporter.start(event, f"from {path}{sources}", run, restored)
    for why in refused:
        reporter.event("refused", why, run.progress)
    for prefix in restored.changed_data:
        reporter.event("mended", f"data {prefix!r} has other tokens than when {path} was written", run.progress)
    for change in restored.changes:
        reporter.event("batch", change.reason, run.progress, **change.to_dict())
    return event == "branched"


def restore_newest(
    run: Run, newest_first: Sequence[checkpoint.Location]
) -> tuple[checkpoint.Location, Restored, list[str]]:
    """Restore the newest checkpoint that is not damaged. Returns it, the state restored, and why newer ones were
    refused. Raises UserError when all are damaged, and at once when one cannot be read: it may be whole, and an older
    one in its place would lose steps."""
    refused: list[str] = []
    for path in newest_first:
        try:
            return path, run.restore(path), refused
        except checkpoint.DamagedError as error:
            refused.append(str(error))
    raise UserError("; ".join(refused))


def checkpoints_to_start_from(run: Run, resume: bool) -> tuple[str, list[str]]:
    """Return the event that a start is, and the URLs of the checkpoints to try, newest first. Raises UserError."""
    if resume and (found := checkpoint.candidates(run.folder, run.config.checkpoint.remote)):
        return "resumed", list(map(checkpoint.url_of, found))
    if origin := run.config.train.start_from:
        return "branched", [checkpoint.url_of(checkpoint.find(checkpoint.location(origin)))]
    return "started", []
