"""`python -m fettle`: the command line."""

from fettle.cli.main import run

if __name__ == "__main__":
    run()
