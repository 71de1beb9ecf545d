"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake of the user: one sentence that says what arrived, what was expected and what to do.

    The command line prints it as `personalize: <message>` and exits with `exit_code`, without a traceback.
    """

    exit_code = 2


class Mismatch(UserError):
    """What was asked to be checked is not as it should be: the input could be read, and is wrong."""

    exit_code = 1
