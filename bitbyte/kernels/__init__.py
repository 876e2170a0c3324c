"""What exists only to be fast; each module names its plain reference in its first line."""
