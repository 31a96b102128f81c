"""Images, views of them, their order, and masks: everything random here is a pure function of its key."""
