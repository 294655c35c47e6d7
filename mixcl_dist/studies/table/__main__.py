"""`python -m mixcl_dist.studies.table DIR ITEM`: how the runner starts an item."""

import sys
from pathlib import Path

from mixcl_dist.studies.table.work import work

work(Path(sys.argv[1]), sys.argv[2])
