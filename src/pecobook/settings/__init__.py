"""Settings of the commands, one file for each command: frozen, keyword-only dataclasses with documented fields.

A field without an explanation is an inherited setting with another default. No module here imports torch, so that every
`--help` answers at once. Other modules take these objects whole.
"""
