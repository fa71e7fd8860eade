"""What can go wrong for a user: one exception class per exit code, each message naming place, value, range and fix."""

from __future__ import annotations


class QaftError(Exception):
    """A failure that the user can act on; the command line prints its message without a traceback.

    ``exit_code`` follows the conventions of the README: 1 failure in a run, 2 usage, 4 data, 5 a comparison failed.
    """

    exit_code = 1


class RecipeError(QaftError):
    """The recipe or the command line is wrong: unknown key, wrong type, impossible value."""

    exit_code = 2


class TargetError(RecipeError):
    """A name pattern matches no layer, or matches something that cannot be adapted."""


class IncompatibleError(RecipeError):
    """Two choices that exclude each other; the message holds the reason and the alternatives."""


class DataError(QaftError):
    """A data file is missing, broken, or holds nothing to learn from; the message names file and line."""

    exit_code = 4


class ModelError(QaftError):
    """A checkpoint cannot be read, or its architecture does not support what was asked."""


class TrainingError(QaftError):
    """Training cannot go on (a loss that is not finite, a checkpoint that fails its own check)."""


class OutOfMemoryError(QaftError):
    """The device or the host has no memory left; the message names what was tried and what takes less."""


class ExportError(QaftError):
    """An export cannot be written, or is refused because it would not be the trained model."""


class DifferenceError(QaftError):
    """Two models differ by more than the bound of their comparison."""

    exit_code = 5
