"""Errors that a command reports in one line, without a traceback."""


class UserError(ValueError):
    """The user's mistake: the message names the file or setting, what is wrong and what to do.  Exit code 2."""
