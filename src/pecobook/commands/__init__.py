"""The commands other than training; each is a file or a folder."""
