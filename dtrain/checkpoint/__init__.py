"""Floor 3: the checkpoint store."""
