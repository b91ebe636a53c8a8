"""`python scripts/evaluate.py` is `denoiselab-evaluate`."""

from denoiselab.app import evaluate_command

if __name__ == "__main__":
    evaluate_command()
