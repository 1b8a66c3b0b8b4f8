"""TOML file + dotted overrides -> frozen dataclasses."""


class UserError(Exception):
    """Wrong input from outside: one line that names the file, line or key and what was expected.

    The command line prints it without a traceback and exits with status 2.
    """
