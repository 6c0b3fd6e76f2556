"""The engine: requests in, plans through the executor, deltas out; and the client that a server talks to."""
