"""The retriever: passages for queries over HTTP, and the client that asks for them."""
