"""Where a run stands: ranks, launchers, the queue."""
