"""The exceptions that the command line shows to the user as one line instead of a traceback."""


class UserError(ValueError):
    """An error that the user can correct; its message is one line: what arrived, what was expected, what to do.

    The command line prints it as `personalize: <message>` and exits with `exit_code`, without a traceback.
    """

    exit_code = 2


class Mismatch(UserError):
    """A command that checks something could read it and found it wrong, as `personalize verify` may."""

    exit_code = 1
