"""`python scripts/sweep.py` is `denoiselab-sweep`."""

from denoiselab.app import sweep_command

if __name__ == "__main__":
    sweep_command()
