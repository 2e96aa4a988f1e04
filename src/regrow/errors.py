"""Errors that are the user's to mend."""

import re

SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)\.\s+(?=[A-Z`'\"])")
"""Not the dots of decimals, paths and abbreviations."""


class InputError(ValueError):
    """Something the user gave cannot work: the message says what is wrong and what to do.

    The command line prints the message alone and exits with code 2; any other exception is a bug of ours.
    """


class LostOther(InputError):
    """Another of the run's processes has ended, and has said itself why."""


def first_sentence(text: str) -> str:
    """Of a library's message: what is wrong, without the advice that follows and without a full stop."""
    return SENTENCE_END.split(text, maxsplit=1)[0].rstrip(".")
