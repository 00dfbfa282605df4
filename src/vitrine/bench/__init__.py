"""How fast, with how much memory, beside which others: what ``vitrine bench`` measures."""
