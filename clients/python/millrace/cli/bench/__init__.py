"""The load generator behind `millrace bench serve`: what is sent, how it went, how that is shown."""
