"""python -m kecho.bench"""

import sys

from .cli import main

sys.exit(main())
