"""Room 3: scores per shard, merged into one weight per example, with diagnostics."""
