"""The one exception a user's mistake raises, the warnings that are for the user, and the exit statuses."""

# Exit statuses; NOT_CHANGED: written, but nothing changed or the edit went to noise.
DONE, CRASH, MISTAKE, NOT_CHANGED, INTERRUPTED = 0, 1, 2, 3, 130

LONGEST = 1600  # characters of a message


class InputError(ValueError):
    """A mistake in what the user gave: the message is one line that says where, what was found, what was expected.

    Names and words out of damaged files stand in messages: what a terminal would act on is escaped, and what is too
    long to read is cut in its middle.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} [...] {message[-LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))

    def _render_traceback_(self) -> list[str]:
        """What IPython prints of it: the line alone; `%tb` has the rest."""
        return [f"{type(self).__name__}: {self}"]


class OutOfMemory(InputError):
    """There is not enough memory, also with smaller settings: nobody's mistake, exit status 1."""


class Lost(InputError):
    """An edit whose splats are no longer finite: the rates or the scale were too high."""


class LossWarning(UserWarning):
    """A file was written, or read, that does not hold all there was: the message is one line that says what is lost."""


class ExposedWarning(UserWarning):
    """Other machines can reach what is served here: the message is one line that says what they could do."""
