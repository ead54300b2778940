"""Servicers: check, call the core, map the error, answer. No tensor code."""
