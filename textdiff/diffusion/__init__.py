"""The mathematics: schedules, processes, noise, blocks and objectives.

Knows no network, file or screen.
"""
