"""The client: a model whose blocks are elsewhere. Embeddings, LM head and sampling stay in this process."""
