"""A copy of the log at Weights & Biases, for those who want one; the run directory is whole without it.

wandb works through a process of its own and a host that may be far, down, or refuse us, and any call to it may hang.
So one thread does all of it. Training hands its rows to that thread and never waits; only `close` does, for a while.
"""

import importlib.util
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megahp.errors import UserError

START_SECONDS = 30.0  # for the host to accept the run, while training goes on
CLOSE_SECONDS = 10.0  # for what is still to be sent at the end
MOST_WAITING = 10_000  # rows, when the thread hangs


class WandbLog:
    """Sends metrics and events to Weights & Biases; whatever it does wrong, training goes on.

    The first failure is told in one line, by the next call from training's own thread; after it nothing is sent.
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
        """Start the run `run_id`, or go on with it; its files go under `directory`/wandb.

        `mode` is "online", or "offline": files only, for `wandb sync`. Raises UserError when wandb is missing.
        """
        check_wandb()
        self.say, self.failure, self.stopped = say, "", False
        self.rows: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(MOST_WAITING)
        start = dict(mode=mode, project=project, name=name, dir=str(directory), id=run_id, config=config)
        self.thread = threading.Thread(target=self._send, args=(start,), name="wandb", daemon=True)
        self.thread.start()

    def metrics(self, record: dict[str, Any]) -> None:
        """Log one object of metrics.jsonl, but for its nulls. Steps the run has already are ignored by wandb."""
        layers = {f"noise_scale_layers/{name}": value for name, value in record.get("noise_scale_layers", {}).items()}
        values = {key: value for key, value in (record | layers).items() if isinstance(value, int | float)}
        self._put((record["step"], values))

    def event(self, event: str, reason: str, step: int) -> None:
        """Log an event, as a text beside the metrics of its step."""
        self._put((step, {f"event/{event}": reason}))

    def close(self) -> None:
        """End the run. All of it is on disk after this, or sent where it is online."""
        self._put(None)
        if not self.stopped:
            self.thread.join(CLOSE_SECONDS)
            if self.thread.is_alive():
                self.failure = self.failure or f"not done after {CLOSE_SECONDS:g} s"
            self._tell()

    def _put(self, row: tuple[int, dict[str, Any]] | None) -> None:
        self._tell()
        if not self.stopped:
            try:
                self.rows.put_nowait(row)
            except queue.Full:
                self.failure = f"it hangs, with {MOST_WAITING} rows to send"

    def _tell(self) -> None:
        if self.failure and not self.stopped:
            self.stopped = True
            self.say(f"Weights & Biases is left out from here: {self.failure}; the numbers are in metrics.jsonl")

    def _send(self, start: dict[str, Any]) -> None:
        """What the thread does; `start` is what wandb.init is given."""
        try:
            import wandb

            # Before init, which would ask for a missing API key on a terminal that it is not yet silent on.
            quiet: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": START_SECONDS}
            # machine info: code and git state among it
            wandb.setup(wandb.Settings(**quiet, x_disable_machine_info=True, x_save_requirements=False))
            run = wandb.init(**start, resume="allow")
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
            while row := self.rows.get():
                step, values = row
                run.log(values, step=step)
            run.finish()
            wandb.teardown()  # waits for wandb's process, which is the one that writes
        except (Exception, SystemExit) as error:  # the latter from teardown, when that process failed
            self.failure = " ".join(repr(error).split())


def check_wandb() -> None:
    """Raise UserError when wandb is missing."""
    package = importlib.util.find_spec("wandb")
    if package is None or package.origin is None:  # any folder called wandb can be imported, but has no origin
        raise UserError("Weights & Biases was asked for and is missing; pip install wandb")


def new_id() -> str:
    """A fresh run id: 12 hexadecimal digits."""
    return secrets.token_hex(6)
