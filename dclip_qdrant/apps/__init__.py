"""The student inside other people's apps: fastembed and qdrant-client, LangChain, LlamaIndex, Haystack; each
file imported only by those who use it."""
