"""What the command gives up before it serves: privileges, and what the sandbox forbids."""
