"""Pixels to what the network sees, and back."""
