"""Whether an engine beside epoll is available."""
