"""``python -m atlantis_ds``: the command line, in a form that every launcher can start."""

from atlantis_ds.cli import main

if __name__ == "__main__":
    main()
