"""Code that exists only to be fast; the first line of each module names its plain reference."""
