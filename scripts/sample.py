"""`python scripts/sample.py` is `denoiselab-sample`."""

from denoiselab.app import sample_command

if __name__ == "__main__":
    sample_command()
