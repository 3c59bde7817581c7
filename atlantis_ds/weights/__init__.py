"""Step 3: scores in shards, merged into one weight per example, with diagnostics."""
