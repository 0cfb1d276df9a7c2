"""Errors that the command line shows without a traceback."""


class UserError(Exception):
    """One sentence for the user.  The command line prints it and exits with code 2."""
