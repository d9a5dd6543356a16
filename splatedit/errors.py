"""The one exception a user's mistake raises."""


class InputError(ValueError):
    """A mistake in what the user gave: the message is one line that says where, what was found, what was expected."""


class Lost(InputError):
    """An edit whose splats are no longer finite: the rates or the scale were too high."""
