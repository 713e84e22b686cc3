"""Errors that a command reports in one line, without a traceback."""


class UserError(ValueError):
    """The user's mistake: the message names the file or setting, what is wrong and what to do.  Exit code 2."""


class SetMistake(UserError):
    """A mistake in the user's own list of images or the file that describes it, which finished results do not excuse.

    Other UserErrors of looking at raw data may mean that the data are not at hand now.
    """
