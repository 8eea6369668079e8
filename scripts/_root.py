"""Puts the repository root on the import path, whatever the working directory or launcher."""

import os
import sys
from pathlib import Path

# Before torch is imported: threads that wait by spinning take the cores from those that they wait
# for, wherever something else runs too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
