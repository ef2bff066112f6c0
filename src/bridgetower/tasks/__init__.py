"""What a model can be trained on and measured by: one value per task, and a table of them; importable without torch."""
