"""Step 1: reads all formats and writes one table of examples."""
