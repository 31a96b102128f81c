"""What a user types beside training: a file or a folder each."""
