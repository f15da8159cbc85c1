"""Floor 0: config, errors, storage, fingerprints, the world. Knows nothing of data or models."""
