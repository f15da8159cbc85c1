"""Floor 2: encoders, heads, objectives. Knows no ranks."""
