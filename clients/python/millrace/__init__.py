"""Millrace's Python SDK."""
