"""`pldr serve`: an OpenAI-compatible server, with the certificate and a page.

In: an `OpenModel`, and an engine that decodes it (engine.py): transformers' continuous batching, vLLM's own server as a child
process, or the live model. fastapi, uvicorn and prometheus-client are an extra (`pldr[serve]`).
Out: HTTP (docs/serve.md).
"""
