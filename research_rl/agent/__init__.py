"""The trained agent for people: one question in, one episode of reasoning with search out. The loop itself is `research_rl.episode`."""
