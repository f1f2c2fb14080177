"""`pldr serve`: an OpenAI-compatible server of a bundle.

In: an opened model, and an engine that decodes it (`engine.py`): transformers' continuous batching or vLLM. Out: HTTP.
"""
