"""`python scripts/sync.py` is `denoiselab-sync`."""

from denoiselab.app import sync_command

if __name__ == "__main__":
    sync_command()
