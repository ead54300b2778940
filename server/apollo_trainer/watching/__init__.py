"""What watchers are told: fed by runs, read by services."""
