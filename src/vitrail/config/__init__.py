"""Every setting, recipes by name, and their files."""
