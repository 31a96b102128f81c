"""Settings of the commands, one file per command: frozen, keyword-only dataclasses with documented fields.

A field without a docstring is an inherited setting with another default. No module here imports torch, so that `--help`
is instant. Other modules take these objects whole.
"""
