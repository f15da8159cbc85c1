"""Floor 2: samples to tensors."""
