"""Step 4: the DeepSpeed engine and the weighted optimizer step."""
