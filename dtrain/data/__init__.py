"""Floor 1: from raw exports to a stream of samples."""
