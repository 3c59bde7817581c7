"""The typed recipe, and how it is read from a file."""
