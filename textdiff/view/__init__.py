"""Views: the progress of a run, and texts while they are denoised, live, as a film or as a trace.

A terminal gets live views; a pipe or a file gets plain lines.
"""
