"""`python scripts/certify.py` is `denoiselab-certify`."""

from denoiselab.app import certify_command

if __name__ == "__main__":
    certify_command()
