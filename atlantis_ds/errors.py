"""The errors that end a run on purpose, and their exit codes."""


class InputError(Exception):
    """Bad input or a bad recipe: one line that names the file, line or key and what to do. Exit code 2."""


class RunError(Exception):
    """A fault during a run; finished work is kept. Exit code 1."""


class Preempted(Exception):
    """The run was asked to stop and has saved: the same command resumes it. Exit code 75."""
