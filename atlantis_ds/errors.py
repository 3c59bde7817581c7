"""The ways in which a run ends early on purpose, and their exit codes."""


class InputError(Exception):
    """Bad input or a bad recipe: one line that names the file, line or key and what to do. Exit code 2."""


class RunError(Exception):
    """A fault in the middle of a run; what was finished stays finished. Exit code 1."""


class Preempted(Exception):
    """The run was asked to stop, and has saved where it is: the same command goes on from there. Exit code 75."""
