"""One episode of reasoning with search: prompt, protocol, loop and trajectory. Knows no trainer and no server."""
