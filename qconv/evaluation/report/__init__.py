"""Runs as people read them: one offline HTML page, Markdown, and JUnit for a CI server."""
