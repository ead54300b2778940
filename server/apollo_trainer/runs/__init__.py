"""Runs: their queue, their one thread, their events, and who follows them."""
