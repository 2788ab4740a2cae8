"""sdae-cli: parses, calls the other rooms, prints. Those rooms are imported when a command needs them."""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType

import typer

from cli import machine, notebook, paper, predict, results, runs, sweep
from cli.output import printable
from cli.runs import INTERRUPTED
from sdae.errors import RESUME_ME, BrokenInput, Interrupted, RunFailed, UserError

ROOMS = ("sdae", "ablations", "slurm", "analysis", "cli")

app = typer.Typer(
    help="Re-runs the ablations of SdAE (ECCV 2022) and says what of the paper holds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(runs.reproduce)
app.command()(runs.run)
app.command()(runs.parity)
app.add_typer(sweep.app, name="sweep")
app.add_typer(results.app, name="results")
app.add_typer(paper.app, name="paper")
app.add_typer(machine.data, name="data")
app.add_typer(machine.weights, name="weights")
app.command()(predict.predict)
app.command()(machine.doctor)
app.command()(notebook.notebook)


def main() -> None:
    """Exit codes: 0 done, 1 a run or check failed, 2 bad input, 75 stopped and resumable, 130 Ctrl-C."""
    stopped = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without some sign is given its number
            stream.reconfigure(errors="backslashreplace")

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        signal.default_int_handler(number, frame)

    if plain := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    try:
        try:
            code = app(standalone_mode=False)
        except (UserError, RunFailed, Interrupted):
            raise
        except Exception as error:  # compiled code, as pydantic's, wraps a Ctrl-C that met it in an error of its own
            if stopped:
                raise KeyboardInterrupt from error
            raise
        sys.stdout.flush()
        if stopped and code == INTERRUPTED:  # typer says nothing of a Ctrl-C
            fail("stopped; the same command goes on", INTERRUPTED)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        fail(str(error), error.code)
    except RunFailed as error:
        fail(str(error), 2 if isinstance(error, BrokenInput) else 1)
    except Interrupted as error:
        fail(str(error), RESUME_ME)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on", INTERRUPTED)
    except (ImportError, AttributeError) as error:
        if (cure := lacking(error)) is None:
            raise
        fail(cure, 2)
    except OSError as error:  # a disk or a folder that fails below a command
        if error.filename is None and not unprintable():
            raise
        fail(f"{error.filename or 'what is printed'}: {error.strerror or error}", 2)
    except Exception as error:
        if type(error).__name__ == "Abort":  # typer's word for Ctrl-C
            fail("stopped; the same command goes on", INTERRUPTED)
        if not hasattr(error, "format_message"):  # a usage error of typer's, whichever click it stands on
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        fail(" ".join(error.format_message().split()), 2)
    finally:
        if plain:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(code if isinstance(code, int) else 0)


def unprintable() -> bool:
    """Whether stdout takes no more; then Python need not try again when it ends."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def lacking(error: Exception) -> str | None:
    """The line for an import that failed because a package is absent, broken or too old; None where it is our fault."""
    from slurm.doctor import packages

    bad = [f"{row['check']} {row['detail']}" for row in packages() if not row["ok"]]
    name = getattr(error, "name", None) or "a package"
    if not bad and (not isinstance(error, ImportError) or name.partition(".")[0] in ROOMS):
        return None
    what = "; ".join(bad) or f"{name} cannot be imported: {error}"
    return f"{what}: `make setup` installs the tested versions, `sdae-cli doctor` checks them"


def fail(message: str, code: int) -> None:
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
