"""python -m kecho"""

import sys

from .cli import main

sys.exit(main())
