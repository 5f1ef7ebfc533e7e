"""The export of a model: its writing, its loading, and where it comes from."""
