"""`python scripts/frontier.py` is `denoiselab-frontier`."""

from denoiselab.app import frontier_command

if __name__ == "__main__":
    frontier_command()
