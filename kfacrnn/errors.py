"""The one exception that reaches a user of the command line."""


class UserError(Exception):
    """A mistake of the user's, or of the world's, that one line explains: what, where, and the nearest right thing.
    The command line prints the message without a traceback and exits with code 2."""

    def __str__(self) -> str:
        """One line that can be read, whatever values it quotes."""
        words = super().__str__().split()
        return " ".join(word if len(word) <= 300 else f"{word[:150]}…{word[-150:]}" for word in words)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or what it is called if it says nothing."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
