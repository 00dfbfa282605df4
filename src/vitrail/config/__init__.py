"""All settings, presets, and their files."""
