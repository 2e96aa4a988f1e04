"""Errors that are the user's to mend."""


class InputError(ValueError):
    """Something the user gave cannot work: the message says what is wrong and what to do.

    The command line prints the message alone and exits with code 2; any other exception is a bug of ours.
    """


class LostOther(InputError):
    """Another of the run's processes has ended, and has said itself why."""
