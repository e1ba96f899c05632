"""The runtime daemon: engines in, tokens out."""
