"""Finds in two minutes, on the nodes of a job, what would make it fail or run slowly."""
