"""What a command cannot do, and why."""


class Refusal(Exception):
    """One sentence for the user.  The command line prints it and exits with code 2."""
