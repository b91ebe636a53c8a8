"""`python scripts/report.py` is `denoiselab-report`."""

from denoiselab.app import report_command

if __name__ == "__main__":
    report_command()
