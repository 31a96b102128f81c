"""Helpers for all other packages: processes, devices, files, sizes of images."""
