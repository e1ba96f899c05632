"""The `millrace` command: a client of both daemons, and the local stack."""
