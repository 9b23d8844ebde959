"""The one exception that means: what the user gave cannot be used."""


class UserError(Exception):
    """A mistake in a setting, a file or a command, told in one line.

    The message names what is wrong (the setting or file), its value, and the remedy.
    The command line prints it without a traceback and exits with code 2.
    """
