"""Errors that are the user's to mend, and the exit codes of our commands."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # stopped on request after a checkpoint: start me again (BSD's EX_TEMPFAIL)


class UserError(Exception):
    """Wrong input. Its text names the field, its value, what it conflicts with and what to do.

    Commands print the text alone on stderr, without a traceback, and exit with 2.
    """
