"""Every error that we raise on purpose.

DclipError              failure     anything below; front ends show its one line, and a traceback for the rest
├── UsageError          usage       an argument, a path or a recipe that can't be meant
│   └── RecipeError     usage       a key or value in a recipe
├── MissingExtra        missing     a package that this needs is not installed
├── InputError          input       data that can't be used
│   ├── SchemaError     input       a table without the columns of its contract
│   └── ImageError      input       a picture that can't be read
│       └── ImageTooLarge too_large a picture of more pixels or bytes than are allowed
├── LeakError           input       the same picture in train and in test
├── StudentError        student     a student folder that is incomplete or altered
├── ParityError         failure     an export that doesn't agree with what was trained
├── StoreError          store       the collection or its engine said no
│   └── PointError      store       ... to these points; others may be fine
├── PartialError        partial     done, but some rows were rejected
├── GateError           gate        a student below its retention gate (the student is kept)
└── MismatchError       mismatch    a collection that another student filled

`kind` is what front ends translate: the command line to an exit code, the service to an HTTP status.
Messages name parameters as Python has them, between backticks; the command line turns them into its flags.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_names: ContextVar[Mapping[str, str] | None] = ContextVar("names", default=None)


@contextmanager
def calling_parameters(names: Mapping[str, str]) -> Iterator[None]:
    """Errors from inside print `parameter` under its name in `names`: what a front end calls it."""
    token = _names.set(names)
    try:
        yield
    except DclipError as error:
        error.names = error.names or names  # it is printed after this context was left
        raise
    finally:
        _names.reset(token)


class DclipError(Exception):
    """Where it happened · what came · what was expected · what to do."""

    kind = "failure"
    names: Mapping[str, str] | None = None  # what a front end calls parameters

    def __init__(self, where: object, came: str, expected: str | None = None, do: str | None = None) -> None:
        self.where, self.came, self.expected, self.do = str(where), came, expected, do
        super().__init__(self._line())

    def _line(self) -> str:
        line = f"{self.where}: {self.came}"
        if self.expected:
            line += f"; expected {self.expected}"
        return line + (f" -> {self.do}" if self.do else "")

    def __str__(self) -> str:
        names = self.names or _names.get() or {}
        return re.sub(r"`(\w+)`", lambda match: names.get(match.group(1), match.group(0)), self._line())

    @classmethod
    def of_line(cls, line: str) -> "DclipError":
        """An error out of the line that it printed: where an exception crossed a border as text alone."""
        where, _, came = line.partition(": ")
        return cls(where, came) if came else cls("", line)

    def as_json(self) -> str:
        """The whole error as text, for `of_json`."""
        return json.dumps([type(self).__name__, self.where, self.came, self.expected, self.do])

    def __reduce__(self) -> tuple[type, tuple[str | None, ...]]:
        """Crosses process borders whole (Ray pickles errors)."""
        return type(self), (self.where, self.came, self.expected, self.do)


def named(name: str) -> type[DclipError]:
    """One of the errors of this page."""
    return globals()[name]


def of_json(text: str) -> DclipError:
    """The error that `as_json` wrote."""
    name, *parts = json.loads(text)
    return named(name)(*parts)


class UsageError(DclipError):
    kind = "usage"


class RecipeError(UsageError):
    pass


class MissingExtra(DclipError):
    kind = "missing"


class InputError(DclipError):
    kind = "input"


class SchemaError(InputError):
    pass


class ImageError(InputError):
    pass


class ImageTooLarge(ImageError):
    kind = "too_large"


class LeakError(DclipError):
    kind = "input"


class StudentError(DclipError):
    kind = "student"


class ParityError(DclipError):
    pass


class StoreError(DclipError):
    kind = "store"


class PointError(StoreError):
    pass


class PartialError(DclipError):
    kind = "partial"


class GateError(DclipError):
    kind = "gate"


class MismatchError(DclipError):
    kind = "mismatch"
