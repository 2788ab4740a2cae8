"""The ways in which the suite says no."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one line that names what is wrong, where, and what is allowed. The command line exits with `code`."""

    code = 2


class RunFailed(Exception):
    """A run that started and could not end (non-finite loss, a broken picture): recorded in `failure.json`, exit 1."""


class BrokenInput(RunFailed):
    """A run that failed by what it was given (a picture that cannot be decoded): recorded as failed, exit 2."""


class Interrupted(Exception):
    """A run that was told to stop, has saved its state (a cost run has none) and wants to be resumed. Exit code
    `RESUME_ME`.

    signals: the numbers of those that told it.
    """

    def __init__(self, message: str, signals: Iterable[int] = ()):
        super().__init__(message)
        self.signals = frozenset(signals)


RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
