"""The one exception a user's mistake raises."""


class InputError(ValueError):
    """A mistake in what the user gave: the message is one line that says where, what was found, what was expected."""
