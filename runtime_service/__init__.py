"""The serve daemon: engines in, tokens out."""
