"""The command line: only this folder reads one. Heavy imports are inside the commands that need them."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Annotated, NoReturn

import typer

from atlantis_ds import __version__
from atlantis_ds.cli.app import app
from atlantis_ds.cluster.ranks import end_rank
from atlantis_ds.errors import InputError, Preempted, RunError
from atlantis_ds.trackers import close_trackers

# isort: off
from atlantis_ds.cli import start, stages, results, jobs  # noqa: F401  # in the order of --help


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run a command; errors become one line and an exit code: 2 bad input, 1 a fault in the run, 75 preempted."""
    arguments = sys.argv[1:]
    # The `deepspeed` launcher puts this before every program's own arguments.
    sys.argv[1:] = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    try:
        try:
            app()
        finally:
            close_trackers()
    except InputError as error:
        _end(f"error: {error}", 2)
    except RunError as error:
        _end(f"fault: {error}", 1)
    except Preempted as error:
        _end(f"preempted: {error}", 75)
    except OSError as error:
        _end(f"fault: {error}", 1)  # a full disk, a read-only folder: finished work is kept
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except RuntimeError as error:
        from atlantis_ds.cluster.ranks import lost_a_rank

        if not lost_a_rank(error):
            raise
        _end(f"fault: another rank has died ({str(error).splitlines()[0][:200]}); its own output says why", 1)
    except SystemExit as ended:  # the command line always ends like this, also without an error
        if "RANK" not in os.environ or not isinstance(ended.code, int):
            raise
        end_rank(ended.code)


def _end(line: str, code: int) -> NoReturn:
    main_rank = os.environ.get("RANK", "0") == "0"
    if code == 75 and not main_rank:
        end_rank(code)  # all ranks have agreed to stop and have saved; only rank 0 says so
    if not main_rank:
        # Usually all ranks raise the same error: give rank 0 time to print it, and the launcher time to end the others.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(5)
    print(line, file=sys.stderr)
    end_rank(code)
