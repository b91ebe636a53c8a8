"""`python scripts/prefetch.py` is `denoiselab-prefetch`."""

from denoiselab.app import prefetch_command

if __name__ == "__main__":
    prefetch_command()
