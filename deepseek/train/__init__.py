"""Training: one loop, the jobs that run it, and their parts: text, gates, rewards and hashes."""
