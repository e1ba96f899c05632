"""The text that a build calibrates and measures with, as token windows."""
