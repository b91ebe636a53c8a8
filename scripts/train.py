"""`python scripts/train.py` is `denoiselab-train`."""

from denoiselab.app import train_command

if __name__ == "__main__":
    train_command()
