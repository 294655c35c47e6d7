"""`python -m mixcl_dist.table DIR ITEM`: how the runner starts an item."""

import sys
from pathlib import Path

from mixcl_dist.table.work import work

work(Path(sys.argv[1]), sys.argv[2])
