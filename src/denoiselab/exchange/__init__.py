"""Weights from and for elsewhere: other projects' names and configs, and programs that run without this package."""
