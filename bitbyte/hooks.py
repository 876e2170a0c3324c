"""What reaches into the training loop from outside: signals that stop it, trackers that watch."""

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from bitbyte.files import BitbyteError


@contextlib.contextmanager
def interrupts():
    """Collect Ctrl-C and termination signals: the list is true once one came.

    A second Ctrl-C is the ordinary KeyboardInterrupt.  Only the main thread can do this; elsewhere
    signals keep their meaning.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number, frame):
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_tracker(name: str | None, run: Path, config: dict) -> Callable[[dict], None] | None:
    """A function that forwards a row to the tracker ``name``; metrics.jsonl stays the truth."""
    if name is None:
        return None
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(run / "tensorboard")

            def log(row: dict) -> None:
                for key, value in row.items():
                    if value is not None and key != "step":
                        writer.add_scalar(key, value, row["step"])
                writer.flush()

            return log
        import wandb
    except ImportError:
        raise BitbyteError(
            f"{name} is not installed: pip install 'bitbyte[track]', or drop --tracker"
        ) from None
    session = wandb.init(
        project="bitbyte", name=run.name, dir=str(run), mode="offline",
        config=config,
    )  # fmt: skip
    return lambda row: session.log(row, step=row["step"])
