"""One HTML page over runs that needs no server, no account and no network: gathered here, drawn by the scripts in assets/."""
