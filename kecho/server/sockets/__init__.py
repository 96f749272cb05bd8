"""Listening sockets: opened by address or path, or inherited."""
