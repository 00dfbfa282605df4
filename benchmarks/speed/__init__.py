"""How fast, with how much memory, beside which others: what ``benchmarks/bench.py`` measures."""
