"""What the services' metrics say before anything was asked of them."""

from __future__ import annotations

from research_rl.agent import observe as agent
from research_rl.agent.standing import Standing
from research_rl.retriever import observe as retriever

__all__ = ["agent_metrics", "retriever_metrics"]


def retriever_metrics() -> retriever.RetrieverMetrics:
    return retriever.RetrieverMetrics(lambda: 0, lambda: 0, lambda: 0)


def agent_metrics() -> agent.AgentMetrics:
    return agent.AgentMetrics(lambda: 0, lambda: 0, lambda: Standing("policy-test", "after", 0.0), lambda: {})
