"""Sample generation, features, distances, and the protocol record beside each number."""
