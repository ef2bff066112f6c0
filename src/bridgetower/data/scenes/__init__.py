"""Generated pictures of coloured shapes, with captions, questions and statements whose truth is known."""
