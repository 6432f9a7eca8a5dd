"""Text in, text out: thoughts of what was read, tokens written and scored; no text depends on those beside it."""
