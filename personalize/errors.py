"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake of the user: one sentence that says what arrived, what was expected and what to do.

    The command line prints it as `personalize: <message>` and exits with code 2, without a traceback.
    """
