"""What a user may set, one file a command: frozen, keyword-only dataclasses whose fields explain themselves.

Nothing here imports torch, so that every `--help` answers at once. Modules take these objects whole.
"""
