"""Floor 4: the loop, evaluation, run folders."""
