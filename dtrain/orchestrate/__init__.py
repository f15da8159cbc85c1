"""Floor 5: jobs on a Ray cluster. The only place beside `dtrain.serve` that imports Ray."""
