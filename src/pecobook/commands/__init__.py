"""The commands other than training; each command is a file or a folder."""
