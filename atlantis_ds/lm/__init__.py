"""Step 2: language models: load, encode, batch, and the only label log-likelihood function."""
