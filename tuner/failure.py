"""The error of a sweep that the machine ended, not the code."""


class Failure(Exception):
    """A sweep could not go on; the message says why and what helps."""
