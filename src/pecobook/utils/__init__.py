"""Helpers for all other packages: processes, devices, files, image sizes."""
