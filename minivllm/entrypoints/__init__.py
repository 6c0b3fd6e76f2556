"""Older commands that start the server."""
