"""Every error that we raise on purpose.

DclipError              exit 1   anything below; the CLI prints its one line, and a traceback for everything else
├── UsageError          exit 2   a flag, a path or a recipe that can't be meant
│   └── RecipeError              a key or value in a recipe
├── MissingExtra        exit 1   a package that this command needs is not installed
├── InputError          exit 1   data that can't be used
│   ├── SchemaError              a table without the columns of its contract
│   └── ImageError               a picture that can't be read
├── LeakError           exit 1   the same picture in train and in test
├── StudentError        exit 1   a student folder that is incomplete or altered
├── ParityError         exit 1   an export that doesn't agree with what was trained
├── StoreError          exit 1   the collection or its engine said no
│   └── PointError               ... to these points; others may be fine
├── PartialError        exit 3   done, but some rows were rejected
├── GateError           exit 3   a student below its retention gate (the student is kept)
└── MismatchError       exit 4   a collection that another student filled
"""


class DclipError(Exception):
    """Where it happened · what came · what was expected · what to do."""

    exit_code = 1

    def __init__(self, where: object, came: str, expected: str | None = None, do: str | None = None) -> None:
        line = f"{where}: {came}"
        if expected:
            line += f"; expected {expected}"
        if do:
            line += f" -> {do}"
        super().__init__(line)
        self.where, self.came, self.expected, self.do = str(where), came, expected, do

    def __reduce__(self) -> tuple:  # crosses process borders whole (Ray pickles errors)
        return type(self), (self.where, self.came, self.expected, self.do)


class UsageError(DclipError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class MissingExtra(DclipError):
    pass


class InputError(DclipError):
    pass


class SchemaError(InputError):
    pass


class ImageError(InputError):
    pass


class LeakError(DclipError):
    pass


class StudentError(DclipError):
    pass


class ParityError(DclipError):
    pass


class StoreError(DclipError):
    pass


class PointError(StoreError):
    pass


class PartialError(DclipError):
    exit_code = 3


class GateError(DclipError):
    exit_code = 3


class MismatchError(DclipError):
    exit_code = 4
