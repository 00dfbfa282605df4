"""What ``benchmarks/bench.py`` measures: speed and memory, alone or next to other systems."""
