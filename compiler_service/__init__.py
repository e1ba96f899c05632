"""The compile daemon: checkpoints in, engines out."""
