"""Settings of the commands, one file for each command: frozen, keyword-only dataclasses with documented fields.

No module here imports torch, so that every `--help` answers at once. Other modules take these objects whole.
"""
