"""Measuring and showing what codebooks and masked models have learnt; knows nothing of stages."""
