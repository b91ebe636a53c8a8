"""`python scripts/compare.py` is `denoiselab-compare`."""

from denoiselab.app import compare_command

if __name__ == "__main__":
    compare_command()
