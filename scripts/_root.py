"""Puts the repository root on the import path, whatever the working directory or launcher."""

import os
import sys
from pathlib import Path

# Before torch is imported: OpenMP's threads spin for milliseconds while they wait, and so take the
# cores from those that they wait for wherever something else runs too.  The digits beside two busy
# processes on two cores: 1,270 images/s, with this 2,200; alone 7,000 and 6,900.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
