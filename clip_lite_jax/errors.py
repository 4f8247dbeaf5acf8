"""Errors that the person who started the run can mend.

Their messages name the field or file, the value and the way out; the command line prints them
without a traceback.  Any other exception is a bug and shows where it is.
"""


class UserError(Exception):
    """Base of all errors whose message is enough."""

    status = 2
    """What the command line exits with."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run."""


class DataError(UserError, ValueError):
    """Data that a run cannot use."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing or does not fit."""


class Interrupted(UserError, RuntimeError):
    """A run that was asked to end, and has saved where it was; the same command goes on."""

    status = 75  # EX_TEMPFAIL of sysexits.h


class NonFiniteError(UserError, RuntimeError):
    """Loss or gradient stopped being a number."""


class BadImage(UserError, ValueError):
    """An image that cannot be used."""


class Unreadable(BadImage):
    """An image that could not be read this time, of a disk or network: never remembered as bad."""


class PeerError(UserError, RuntimeError):
    """Another process of the run is missing; it may come if all are started again."""

    status = 1
