"""Reports as text, Markdown and HTML."""
