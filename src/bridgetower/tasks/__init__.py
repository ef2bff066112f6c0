"""What a run is told: its config; importable without torch."""
