"""Measurements and pictures of what codebooks and masked models have learned; independent of the stages."""
