"""`pldr serve`: an OpenAI-compatible server of a bundle, and its page.

In: an opened model, and an engine that decodes it (`engine.py`): transformers' continuous batching, vLLM, or the live model.
Out: HTTP.
"""
