"""Sets as their authors publish them: original files to listed pictures and texts."""
