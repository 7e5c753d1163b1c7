"""What all benchmarks share: the command line, results, tables and plots, processes, servers, memory and rounds.

A benchmark imports from it before all else: Python imports from the script's folder first, where onnx.py would shadow
the package onnx.
"""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]

sys.path[:] = [place for place in sys.path if Path(place).resolve() != BENCHMARKS]
