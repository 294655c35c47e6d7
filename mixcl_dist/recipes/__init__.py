"""Named settings: `--recipe NAME` reads NAME.yaml from this folder."""
