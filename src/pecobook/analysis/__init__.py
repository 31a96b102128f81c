"""Measurements and pictures of what codebooks and masked models have learnt; independent of the stages."""
