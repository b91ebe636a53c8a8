"""`python scripts/dashboard.py` is `denoiselab-dashboard`."""

from denoiselab.app import dashboard_command

if __name__ == "__main__":
    dashboard_command()
