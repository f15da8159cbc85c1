"""Floor 5: folders that other tools open."""
