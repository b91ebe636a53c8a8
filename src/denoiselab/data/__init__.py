"""Data sets and datamodules, and the order in which training draws from them."""
