"""`python scripts/convert.py` is `denoiselab-convert`."""

from denoiselab.app import convert_command

if __name__ == "__main__":
    convert_command()
