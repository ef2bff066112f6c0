from browser import browsed, chromium

__all__ = ["browsed", "chromium"]
