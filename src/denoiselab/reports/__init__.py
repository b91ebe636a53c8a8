"""Tables and pictures over runs."""
