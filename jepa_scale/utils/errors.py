"""The one exception that means "the user's input is wrong"."""


class InputError(ValueError):
    """Bad configuration, data or environment, found before any work starts.

    The message is one line that names the key, file, row or rank and says what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class DataError(InputError):
    """A damaged or missing sample, found when it is read: perhaps by one rank alone, in the middle of a run."""
