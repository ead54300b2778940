"""Where the figures of a run go: a CSV file, TensorBoard's event files, Weights & Biases.

A sink keeps the sequence of the last event that it wrote. One that was killed goes on behind it,
without a gap or a repeat.
"""

from apollo_client.sinks.targets import Sink, open_sink, recorded, require_target

__all__ = ["Sink", "open_sink", "recorded", "require_target"]
