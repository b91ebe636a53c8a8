"""Networks, one file each, with the signature `network(x, t, condition) -> Tensor`. torch only."""
