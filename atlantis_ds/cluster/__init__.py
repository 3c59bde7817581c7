"""Where a run executes: ranks, launchers, the queue."""
