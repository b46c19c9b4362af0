"""Training: one loop, the jobs that run it, and what they need: text, gates, rewards, hashes."""
