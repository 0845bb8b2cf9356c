"""The command `fettle`: one file a command, each imported when it is needed."""

from __future__ import annotations

import sys

import typer

from fettle.cli import calibrate, data, demo, doctor, evaluate, fit, inspect, methods, report
from fettle.errors import FettleError, UsageError

DONE, FAILED, WRONG_USE, SOME_REFUSED = 0, 1, 2, 3

app = typer.Typer(
    name="fettle",
    help="Visual anomaly detection on manufactured parts: learn from good pictures, get a verdict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("fit")(fit.fit)
app.command("calibrate")(calibrate.calibrate)
app.command("inspect")(inspect.inspect)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)
app.command("methods")(methods.methods)
app.add_typer(data.app, name="data")
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)


def run() -> None:
    """Entry point. Errors become one sentence and an exit code, never a traceback."""
    try:
        app()
    except UsageError as error:
        print(f"fettle: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)
    except FettleError as error:
        print(f"fettle: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print("fettle: stopped. What was written so far is kept.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(FAILED)
