"""From samples to steps: token ids, loss on the continuation, one update."""
