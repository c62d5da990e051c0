"""The one exception that reaches a user of the command line."""


class UserError(Exception):
    """A mistake of the user's, or of the world's, that one line explains: what, where, and the nearest right thing.
    The command line prints the message without a traceback and exits with code 2."""
