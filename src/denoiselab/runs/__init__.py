"""Run folders, config checks and launching."""
