"""`python -m mixcl_dist.studies.table DIR ITEM`: how the runner starts an item; the table tells its last line."""

import sys
from pathlib import Path

from mixcl_dist.errors import REFUSALS
from mixcl_dist.run import Stopped
from mixcl_dist.studies.table.work import work

if __name__ == "__main__":
    try:
        work(Path(sys.argv[1]), sys.argv[2])
    except (*REFUSALS, Stopped) as told:
        sys.exit(str(told))
