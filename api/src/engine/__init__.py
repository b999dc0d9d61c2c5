"""Qwen3-TTS in tensors: configuration, weights, language model, codec. Imports nothing of the server."""
