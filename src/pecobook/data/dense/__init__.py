"""Images with masks or objects: sources and views."""
