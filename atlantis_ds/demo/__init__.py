"""The demo's own corpus and base models, so that a first run needs no files."""
