"""Step 5: predictions, metrics and the comparison of arms."""
