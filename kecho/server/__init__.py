"""The echo server: options, sockets, engines, confinement, and the command."""
