"""`python scripts/replay.py` is `denoiselab-replay`."""

from denoiselab.app import replay_command

if __name__ == "__main__":
    replay_command()
