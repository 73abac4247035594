"""``python -m clue``, which is how ``torchrun -m clue unlearn RUN`` starts a command in several processes."""

import sys

from .cli import main

sys.exit(main())
