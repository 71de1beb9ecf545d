"""The one error a user can mend."""


class UserError(ValueError):
    """A mistake of the user: its one line says what arrived, what was expected and what to do.

    The command line prints it as `personalize: <message>` and exits with code 2.
    """
