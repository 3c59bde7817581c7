"""Room 2: language models: load, encode, batch, and the one label log-likelihood function."""
