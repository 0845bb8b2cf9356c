"""The command `fettle`: one file a command, each imported when it is needed."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback

import typer

from fettle.cli import calibrate, data, demo, doctor, evaluate, export, fit, inspect, methods, report
from fettle.errors import FettleError, UsageError

DONE, FAILED, WRONG_USE, SOME_REFUSED, STOPPED = 0, 1, 2, 3, 130
DEBUG = "FETTLE_DEBUG"
_LONGEST = 400  # characters of an unexpected error's own words

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
app.command("export")(export.export)
app.command("methods")(methods.methods)
app.add_typer(data.app, name="data")
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)


def run() -> None:
    """Entry point. Errors become one sentence and an exit code; FETTLE_DEBUG=1 adds the traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill loses no more than Ctrl-C
    try:
        app(prog_name="fettle")
    except SystemExit as end:
        if end.code == STOPPED:
            _say_stopped()
        raise
    except KeyboardInterrupt:
        _say_stopped()
        sys.exit(STOPPED)
    except Exception as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exception(error)
        for sentence in (_sentence(error), *getattr(error, "__notes__", ())):
            print(f"fettle: {sentence}", file=sys.stderr)
        sys.exit(WRONG_USE if isinstance(error, UsageError) else FAILED)


def _say_stopped() -> None:
    print("fettle: stopped. What was written so far is kept.", file=sys.stderr)


def _sentence(error: Exception) -> str:
    """What a person should read of an error."""
    if isinstance(error, FettleError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"'{error.filename}': " if error.filename else ""
        return f"{where}{error.strerror}. Check the path, its rights and the free space."
    words = " ".join(str(error).split())[:_LONGEST].rstrip(".")
    what = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return f"unexpected {what}. Run it again with {DEBUG}=1 for the traceback, and report it."
