"""A pyramid of a backbone's features, and what stands on it."""
