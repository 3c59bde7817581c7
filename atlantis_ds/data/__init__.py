"""Room 1: formats in, one table of examples out."""
