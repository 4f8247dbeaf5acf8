"""Published results that reports show beside a run; made by ``benchmarks/compare.py``."""
