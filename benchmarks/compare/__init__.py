"""`make compare`: echo servers side by side, every workload interleaved, judged by kecho.bench."""
