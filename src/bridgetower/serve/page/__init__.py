"""The page for people at `/`; the only place that knows Gradio."""
