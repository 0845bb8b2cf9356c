"""One tree of errors. Each says what is wrong and where, then the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError


class FettleError(Exception):
    """Base of every error that a user can cause or mend.

    Args:
        what: one sentence: what is wrong, and where.
        remedy: one sentence: what to do about it.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what} {remedy}".strip())
        self.what = what
        self.remedy = remedy


class UsageError(FettleError):
    """A wrong name, value or combination in a call (exit code 2 on the command line)."""


class ConfigError(UsageError):
    """A method's field or value that does not exist."""


class PictureError(FettleError):
    """One picture or mask that cannot be used. A run records it and goes on."""


class DataError(FettleError):
    """A data set that cannot be used as asked."""


class WeightsError(FettleError):
    """Backbone weights that are missing, damaged or do not serve what is asked."""


class ModelFolderError(FettleError):
    """A saved model that is damaged, altered, too new or unsafe."""


class CalibrationError(FettleError):
    """A promise that the good pictures at hand cannot carry."""


class MetricError(FettleError):
    """Scores, maps or masks that no metric may be computed from."""


class Failing(NamedTuple):
    """A value that a model of the configuration or of a file refuses.

    Attributes:
        place: the field's name, dotted; empty where fields do not go together.
        given: the value. why: what is wrong with it, without a full stop.
    """

    place: str
    given: object
    why: str

    def __str__(self) -> str:
        return f"{self.place}: {self.why}" if self.place else self.why


def first_failing(error: ValidationError) -> Failing:
    """The first of the values that were refused."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return Failing(place, first["input"], first["msg"].removeprefix("Value error, "))


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The remedy for a wrong name: the nearest right one, then all of them where they are few."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(names)}." if len(names) <= 30 else hint.strip()
