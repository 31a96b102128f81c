"""pecobook."""
