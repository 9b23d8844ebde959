"""Copy the log to Weights & Biases; the run directory is complete without it.

wandb works through a process of its own and a host that may be slow, down, or refuse access, and any call to it may
hang. So one thread makes all calls. Training queues its rows for that thread and never waits; only `close` does, for
CLOSE_SECONDS at most.
"""

import importlib.util
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megahp.errors import UserError

START_SECONDS = 30.0  # for the host to accept the run, while training continues
CLOSE_SECONDS = 10.0  # to send the rest at the end
MAX_QUEUED = 10_000  # rows; more only pile up if the thread hangs


class WandbLog:
    """Sends metrics and events to Weights & Biases; no failure of it affects training.

    The first failure is reported in one line, by the next call from training's own thread; after it nothing is sent.
    """

    def __init__(
        self,
        mode: str,
        project: str,
        name: str,
        directory: Path,
        run_id: str,
        config: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Start or resume the run `run_id`; its files are written under `directory`/wandb.

        mode: "online", or "offline": files only, for `wandb sync`. say: prints a line. Raises UserError if wandb is
        missing.
        """
        check_wandb()
        self.say, self.failure, self.stopped = say, "", False
        self.rows: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(MAX_QUEUED)
        start = dict(mode=mode, project=project, name=name, dir=str(directory), id=run_id, config=config)
        self.thread = threading.Thread(target=self._send, args=(start,), name="wandb", daemon=True)
        self.thread.start()

    def metrics(self, record: dict[str, Any]) -> None:
        """Log one object of metrics.jsonl, without its nulls. wandb ignores steps that the run already has."""
        layers = {f"noise_scale_layers/{name}": value for name, value in record.get("noise_scale_layers", {}).items()}
        values = {key: value for key, value in (record | layers).items() if isinstance(value, int | float)}
        self._put((record["step"], values))

    def event(self, event: str, reason: str, step: int) -> None:
        """Log an event, as a text beside the metrics of its step."""
        self._put((step, {f"event/{event}": reason}))

    def close(self) -> None:
        """End the run. Afterwards all of it is on disk, or sent if online."""
        self._put(None)
        if not self.stopped:
            self.thread.join(CLOSE_SECONDS)
            if self.thread.is_alive():
                self.failure = self.failure or f"not done after {CLOSE_SECONDS:g} s"
            self._report_failure()

    def _put(self, row: tuple[int, dict[str, Any]] | None) -> None:
        self._report_failure()
        if not self.stopped:
            try:
                self.rows.put_nowait(row)
            except queue.Full:
                self.failure = f"it hangs, with {MAX_QUEUED} rows to send"

    def _report_failure(self) -> None:
        if self.failure and not self.stopped:
            self.stopped = True
            self.say(f"logging to Weights & Biases stopped: {self.failure}; the numbers are in metrics.jsonl")

    def _send(self, start: dict[str, Any]) -> None:
        """Run the thread: initialize wandb with `start`, and log queued rows until None comes."""
        try:
            import wandb

            # Before init, which would otherwise ask for a missing API key on the terminal.
            quiet: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": START_SECONDS}
            # Machine info would upload code and git state, too.
            wandb.setup(wandb.Settings(**quiet, x_disable_machine_info=True, x_save_requirements=False))
            run = wandb.init(**start, resume="allow")
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
            while row := self.rows.get():
                step, values = row
                run.log(values, step=step)
            run.finish()
            wandb.teardown()  # waits for wandb's process, which does the writing
        except (Exception, SystemExit) as error:  # SystemExit: from teardown, if that process failed
            self.failure = " ".join(repr(error).split())


def check_wandb() -> None:
    """Raise UserError if wandb is missing."""
    package = importlib.util.find_spec("wandb")
    # A folder named wandb, such as a run's own, can be imported as a namespace package, but has no origin.
    if package is None or package.origin is None:
        raise UserError("log.wandb is on, but wandb is missing; pip install wandb")


def new_id() -> str:
    """Return a new run id: 12 hexadecimal digits."""
    return secrets.token_hex(6)
