"""Old ways to start the server."""
