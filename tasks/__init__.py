"""I/O policy round the stages of `research_rl`: retries, caching, artifacts, tracking, versions, services."""
