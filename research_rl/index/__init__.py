"""The vector index: built with faiss, searched by the retriever service."""
