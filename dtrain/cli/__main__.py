"""`python -m dtrain.cli ...` is `dtrain ...`."""

import sys

from dtrain.cli.main import main

sys.exit(main())
