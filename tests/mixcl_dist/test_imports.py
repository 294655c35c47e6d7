"""Training needs no package that reads other formats, nor Ray: small machines come without them."""

import subprocess
import sys

PROGRAM = """
import sys
for name in ("SimpleITK", "ray", "highdicom", "pydicom"):
    sys.modules[name] = None  # an import of it fails
import mixcl_dist.cli, mixcl_dist.report
import mixcl_dist.pretraining.pretrain, mixcl_dist.finetuning.finetune, mixcl_dist.studies.table.runner
from mixcl_dist.data_shards.catalogue import Catalogue
from mixcl_dist.data_shards.sources import open_source, read_case
from pathlib import Path
source = open_source(Path(sys.argv[1]))
volume = read_case(source.cases[0], Catalogue(source.classes))
assert volume.hu.ndim == 3 and volume.label is not None
folder = open_source(Path(sys.argv[2]))
assert folder.cases and not folder.problems
"""


def test_pretraining_and_finetuning_on_nifti_import_no_other_reader(data):
    subprocess.run([sys.executable, "-c", PROGRAM, data, data / "abdomen" / "images"], check=True)
