"""`python scripts/study.py` is `denoiselab-study`."""

from denoiselab.app import study_command

if __name__ == "__main__":
    study_command()
