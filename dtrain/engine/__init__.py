"""Floor 3: one protocol, two engines: DeepSpeed and a plain torch one that is its oracle."""
