"""How fast, with how much memory, beside which others: what ``vitrail bench`` measures."""
