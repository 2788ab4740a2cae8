"""sdae-cli: parses, calls the other rooms, prints. Those rooms are imported when a command needs them."""

from __future__ import annotations

import os
import sys

import typer

from cli import machine, notebook, paper, predict, results, runs, sweep
from sdae.errors import RESUME_ME, BrokenInput, Interrupted, RunFailed, UserError

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
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        fail(str(error), 2)
    except RunFailed as error:
        fail(str(error), 2 if isinstance(error, BrokenInput) else 1)
    except Interrupted as error:
        fail(str(error), RESUME_ME)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of typer's, whichever click it stands on
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        fail(error.format_message(), 2)
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
