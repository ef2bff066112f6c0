from helpers.servers import browsed, chromium

__all__ = ["browsed", "chromium"]
